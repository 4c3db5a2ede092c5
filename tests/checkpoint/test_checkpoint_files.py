"""The files beside the weights of a pruned model: what older tools read of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from conftest import TEXT, Run, make_tiny_model
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

import slimgpt
from slimgpt.checkpoint.tokenizer import write_tokenizer
from slimgpt.checkpoint.writer import add_older_keys
from slimgpt.errors import ConfigError, MissingDependencyError
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import TOKENIZER_FILES, load_tokenizer

Checkpoint = Callable[[str], Path]
PRUNE = {
    "ratio": 0.3,
    "widths": "scheduled",
    "calibration": TEXT,
    "nsamples": 4,
    "seqlen": 32,
    "refit_epochs": 0,
}
TEXTS = ["Hello world", " spaces  and 12345", "<s>naïve 你好</s>"]

DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(read(file) | values))


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per-layer"])
@pytest.mark.parametrize("rope", [DEFAULT, LINEAR, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_rotary_embeddings_are_stated_for_old_and_new_versions(
    rope: dict[str, Any], uniform: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source, output = tmp_path / "source", tmp_path / "slim"
    make_tiny_model("llama", rope_parameters=rope).save_pretrained(source)
    tokenizer.save_pretrained(source)
    slimgpt.prune(str(source), output, uniform=uniform, **PRUNE)
    values = read(output / "config.json")
    assert values["rope_parameters"] == rope
    assert values["rope_theta"] == rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert values["rope_scaling"] == (None if rope is DEFAULT else scaling)
    assert AutoConfig.from_pretrained(output).rope_parameters == rope
    del values["rope_parameters"]
    (output / "config.json").write_text(json.dumps(values))
    assert AutoConfig.from_pretrained(output).rope_parameters == rope


def test_partial_rotary_embeddings_are_stated_twice(tmp_path: Path) -> None:
    rope = DEFAULT | {"partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
    add_older_keys(tmp_path)
    values = read(tmp_path / "config.json")
    assert values == {
        "rope_parameters": rope,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e6,
        "rope_scaling": None,
    }


@pytest.fixture(scope="module")
def sentencepiece_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all the files of a LLaMA checkpoint on the hub, and one of no known use."""
    from sentencepiece import SentencePieceTrainer

    directory = tmp_path_factory.mktemp("sentencepiece")
    text = directory / "text.txt"
    text.write_text("\n".join(topics.values()))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    LlamaTokenizer.from_pretrained(directory).save_pretrained(directory)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}\n")
    make_tiny_model("llama", vocab_size=400).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per-layer"])
def test_tokenizer_files_are_those_of_the_source(
    uniform: bool, sentencepiece_source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "slim"
    slimgpt.prune(str(sentencepiece_source), output, uniform=uniform, **PRUNE)
    names = {name for name in TOKENIZER_FILES if (sentencepiece_source / name).exists()}
    assert {"tokenizer.model", "tokenizer.json", "chat_template.jinja"} < names
    for name in names:
        assert (output / name).read_bytes() == (sentencepiece_source / name).read_bytes()
    assert not (output / "text.txt").exists()
    check_same_tokenizer(sentencepiece_source, output)


def check_same_tokenizer(source: Path, output: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (output, source))
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per-layer"])
@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<s>"]},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": None},
        None,
    ],
    ids=["new", "old", "no-class", "no-file"],
)
def test_tokenizer_class_is_one_that_older_versions_know(
    values: dict[str, Any] | None, uniform: bool, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, output = tmp_path / "source", tmp_path / "slim"
    shutil.copytree(tiny_checkpoint("llama"), source)
    if values is None:
        (source / "tokenizer_config.json").unlink()
    else:
        edit(source / "tokenizer_config.json", **values)
    slimgpt.prune(str(source), output, uniform=uniform, **PRUNE)
    check_same_tokenizer(source, output)
    if (output / "tokenizer_config.json").exists():
        written = read(output / "tokenizer_config.json")
        assert written["tokenizer_class"] in (None, "PreTrainedTokenizerFast", "LlamaTokenizer")
        assert "extra_special_tokens" not in written
        assert ("additional_special_tokens" in written) == bool(values and len(values) > 1)


def test_tokenizer_of_a_gguf_file_has_a_class_that_older_versions_know(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "model.gguf").output
    source = find_model(str(file))
    shutil.copy(tiny_checkpoint("llama") / "config.json", tmp_path)
    write_tokenizer(source, load_tokenizer(source), tmp_path)
    written = read(tmp_path / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    check_same_tokenizer(tiny_checkpoint("llama"), tmp_path)


def test_recovered_models_have_both_too(slim_checkpoint: Checkpoint, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text[:400]}) for text in list(topics.values())[:8]]
    texts.write_text("\n".join(lines))
    source, output = slim_checkpoint("llama"), tmp_path / "recovered"
    held_out = {"eval_data": TEXT, "eval_tokens": 64}
    slimgpt.recover(str(source), output, data=str(texts), seqlen=32, epochs=1, **held_out)
    values = read(output / "config.json")
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_packages_that_sentencepiece_models_need_are_named(
    package: str, sentencepiece_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(sentencepiece_source / "tokenizer.model", tmp_path)
    make_tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(f"slimgpt.models.tokenizer.is_{package}_available", lambda: False)

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr("slimgpt.models.tokenizer.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(MissingDependencyError, match=f"needs the package '{package}'") as error:
        load_tokenizer(find_model(str(tmp_path)))
    assert "slimgpt[sentencepiece]" in str(error.value.hint)
    assert "sentencepiece and protobuf" in str(error.value.hint)


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot read"),
        (DEEP, "cannot read"),
        ("[]", "its top level is a list"),
        ("null", "its top level is a NoneType"),
        ("7", "its top level is a int"),
        ("", "cannot read"),
        ("\0\0", "cannot read"),
    ],
    ids=["cut", "deep", "list", "null", "number", "empty", "zeros"],
)
def test_broken_tokenizer_files_are_named(
    name: str, text: str, reason: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    (directory / name).write_text(text)
    with pytest.raises(ConfigError, match=reason) as error:
        load_tokenizer(find_model(str(directory)))
    assert f"cannot read {directory / name}" in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": [], "merges": []}}),
        ("tokenizer.json", {"added_tokens": {}}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Unknown"}}),
        ("tokenizer_config.json", {"tokenizer_class": 7}),
        ("tokenizer_config.json", {"tokenizer_class": "NoSuchTokenizer"}),
        ("tokenizer_config.json", {"bos_token": {"content": 5}}),
        ("tokenizer_config.json", {"eos_token": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
    ],
)
def test_tokenizer_files_of_another_form_are_errors(
    name: str, values: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path, run: Run
) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    edit(directory / name, **values)
    code, _, err = run("eval", directory, "--data", TEXT, "--max-tokens", "256", "--seqlen", "64")
    if code == 0:  # transformers makes something of it
        assert name == "tokenizer_config.json"
        return
    assert code == 2
    assert f"error: cannot load the tokenizer of {directory}" in err
    assert "hint: " in err
