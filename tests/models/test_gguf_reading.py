"""GGUF files as models: what is read from them, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import TEXT, Run, make_tiny_model
from llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import slimgpt
from slimgpt.errors import ConfigError, SlimGPTError, UnsupportedModelError
from slimgpt.models.gguf_reading import open_gguf
from slimgpt.models.loading import load_config, load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer

Checkpoint = Callable[[str], Path]
ARGUMENTS = {
    "eval": ("--data", "pydocs"),
    "prune": ("--ratio", "0.3", "--calibration", TEXT),
    "export": (),
}
IDS = torch.arange(10, 70)[None]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def rewrite(
    file: Path,
    output: Path,
    values: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a GGUF file again with other metadata and tensors; None leaves out."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
    entries = {
        name: (field.contents(), field.types)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    kinds = {str: "STRING", int: "UINT32", float: "FLOAT32"}
    for name, value in (values or {}).items():
        entries[name] = (value, [gguf.GGUFValueType[kinds.get(type(value), "STRING")]])
    for name, (value, types) in entries.items():
        if value is not None:
            writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    arrays = {tensor.name: tensor.data for tensor in reader.tensors} | (tensors or {})
    for name, array in arrays.items():
        if array is not None:
            writer.add_tensor(name, np.array(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def output(command: str, directory: Path) -> tuple[str, ...]:
    return () if command == "eval" else ("--output", str(directory / "out"))


@pytest.fixture
def base(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "base.gguf", type="f32").output


def make_gguf(directory: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Path:
    make_tiny_model("llama", hidden_size=64, head_dim=16, **options).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return slimgpt.export(str(directory), directory / "model.gguf", type="f32").output


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_scaled_rotary_frequencies_are_read(
    rope: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = make_gguf(tmp_path / "model", tokenizer, rope_parameters=rope)
    source = find_model(str(file))
    assert load_config(source).rope_parameters == rope
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(load_model(source)), logits(expected), rtol=0, atol=1e-5)
    again = slimgpt.export(str(file), tmp_path / "again.gguf", type="f32").output
    written, wanted = (
        {tensor.name: tensor.data.tolist() for tensor in gguf.GGUFReader(path).tensors}
        for path in (again, file)
    )
    assert written == wanted


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.2}, 2.2),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
        ({}, None),
    ],
)
def test_scaling_in_the_metadata_is_that_of_llama_cpp(
    values: dict[str, Any], expected: float | None, base: Path, tmp_path: Path
) -> None:
    file = rewrite(base, tmp_path / "scaled.gguf", values)
    source = find_model(str(file))
    assert load_config(source).rope_parameters.get("factor") == expected
    top, log_probs = LlamaCpp(file).top_log_probs(IDS[0].tolist(), 20)
    ours = logits(load_model(source))[0, -1].log_softmax(-1)
    assert (ours[top] - log_probs).abs().max() < 1e-3


FACTORS = "rope_freqs.weight"


@pytest.mark.parametrize(
    ("values", "factors", "message"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, None, "'yarn'"),
        ({"llama.rope.scaling.type": "longrope"}, None, "of the type 'longrope'"),
        ({"llama.rope.scaling.type": 3}, None, "of the type 3"),
        ({}, [1, 1, 2, 7], "by 4 factors of 1 to 7"),
        ({}, [1, 1, 8], "by 3 factors of 1 to 8"),
        ({}, [1, 0, 1, 8], "not positive"),
        ({}, [1, np.nan, 1, 8], "not positive"),
        ({}, [1, np.inf, 1, 8], "not positive"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "prune", "export"])
def test_other_scalings_are_refused_by_all_commands(
    command: str,
    values: dict[str, Any],
    factors: list[float] | None,
    message: str,
    base: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    tensors = {FACTORS: np.array(factors, dtype=np.float32)} if factors else {}
    file = rewrite(base, tmp_path / "scaled.gguf", values, tensors)
    code, _, err = run(command, file, *ARGUMENTS[command], *output(command, tmp_path))
    assert code == 2
    assert "scales its rotary frequencies" in err
    assert message in err
    assert "hint: scalings that can" in err


@pytest.mark.parametrize("variant", ["llama", "llama-mha", "llama-tied", "llama-biases", "qwen3"])
def test_a_file_computes_what_its_checkpoint_does(
    variant: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Also: biases of LLaMA and the head size of Qwen3, which transformers does not read."""
    file = slimgpt.export(str(tiny_checkpoint(variant)), tmp_path / "model.gguf", type="f32").output
    expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(variant))
    ours = load_model(find_model(str(file)))
    torch.testing.assert_close(logits(ours), logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", [None, LINEAR], ids=["default", "linear"])
def test_gguf_pruned_and_exported_again(
    rope: dict[str, Any] | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """GGUF to GGUF gives the logits of the checkpoint between, and the ids of the first file."""
    options = {"rope_parameters": rope} if rope else {}
    file = make_gguf(tmp_path / "model", tokenizer, vocab_size=len(tokenizer), **options)
    read = load_tokenizer(find_model(str(file)))
    assert len(read) == len(tokenizer)
    assert max(read.get_vocab().values()) < len(tokenizer)
    output = tmp_path / "slim"
    prune = {"ratio": 0.3, "calibration": TEXT, "nsamples": 4, "seqlen": 32, "uniform": True}
    slimgpt.prune(str(file), output, **prune)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer.get_vocab()
    again = slimgpt.export(str(output), tmp_path / "again.gguf", type="f32").output
    pruned = AutoModelForCausalLM.from_pretrained(output)
    loaded = load_model(find_model(str(again)))
    torch.testing.assert_close(logits(loaded), logits(pruned), rtol=0, atol=1e-5)
    assert load_tokenizer(find_model(str(again))).get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_beside_the_file_is_not_its_own(
    base: Path, tiny_checkpoint: Checkpoint
) -> None:
    text = (tiny_checkpoint("llama") / "tokenizer.json").read_text()
    ids = load_tokenizer(find_model(str(base)))("Hello").input_ids
    assert ids == AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))("Hello").input_ids
    base.with_name("tokenizer.json").write_text(text.replace('"merges": [', '"merges_": ['))
    assert load_tokenizer(find_model(str(base)))("Hello").input_ids == ids


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"llama.block_count": 100_000}, "block_count 100000, but it has 4 blocks"),
        ({"llama.block_count": 0}, "block_count 0, but it has 4 blocks"),
        ({"llama.block_count": "many"}, "block_count many, but it has 4 blocks"),
        ({"llama.block_count": None}, "block_count None, but it has 4 blocks"),
        ({"llama.vocab_size": 2**31}, "vocab_size 2147483648, but it has 320 tokens and 320 rows"),
        ({"llama.vocab_size": 0}, "vocab_size 0, but it has 320 tokens"),
        ({"llama.embedding_length": 2**30}, "embedding_length 1073741824, but it has 48 columns"),
        ({"llama.feed_forward_length": 1}, "feed_forward_length 1, but it has 64 rows"),
        ({"llama.attention.head_count": 0}, "attention.head_count 0, but it has 64 rows"),
        (
            {"llama.attention.head_count": 2**30},
            "attention.head_count 1073741824, but it has 64 rows",
        ),
        ({"llama.attention.head_count_kv": 5}, "attention.head_count_kv 5, but it has 32 rows"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "prune"])
def test_counts_beyond_the_tensors_are_refused(
    command: str, values: dict[str, Any], message: str, base: Path, tmp_path: Path, run: Run
) -> None:
    file = rewrite(base, tmp_path / "odd.gguf", values)
    code, _, err = run(command, file, *ARGUMENTS[command], *output(command, tmp_path))
    assert code == 2
    assert f"error: odd.gguf: its metadata says {message}" in err
    assert "hint: the file is damaged" in err


IMPOSSIBLE = [
    ({"llama.context_length": 0}, "max_position_embeddings=0"),
    ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps=-1.0"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps=nan"),
    ({"llama.rope.freq_base": 0.0}, "rope_parameters.rope_theta=0.0"),
    ({"llama.rope.freq_base": float("inf")}, "rope_parameters.rope_theta=inf"),
    ({"tokenizer.ggml.bos_token_id": 2**31}, "bos_token_id=2147483648, but the vocabulary"),
    ({"tokenizer.ggml.eos_token_id": 320}, "eos_token_id=320, but the vocabulary has tokens"),
    ({"llama.attention.head_count_kv": 32}, "num_attention_heads=8 is no multiple of"),
]


@pytest.mark.parametrize(("values", "message"), IMPOSSIBLE)
def test_impossible_metadata_is_checked_as_a_config_is(
    values: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    file = rewrite(base, tmp_path / "odd.gguf", values)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(find_model(str(file)))
    assert "the file is damaged" in str(error.value.hint)


@pytest.mark.parametrize(
    "key",
    [
        "context_length",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.scaling.factor",
    ],
)
def test_text_in_place_of_a_number(key: str, base: Path, tmp_path: Path) -> None:
    file = rewrite(base, tmp_path / "odd.gguf", {f"llama.{key}": "many"})
    with pytest.raises(ConfigError, match=r"the config of .*odd.gguf") as error:
        load_config(find_model(str(file)))
    assert error.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.ffn_gate_inp.weight", "has 1 tensors that models of type 'llama' do not have"),
        ("rope_factors_long.weight", "first rope_factors_long.weight"),
    ],
)
def test_tensors_of_no_known_use_are_refused(
    name: str, message: str, base: Path, tmp_path: Path
) -> None:
    file = rewrite(base, tmp_path / "more.gguf", tensors={name: np.ones((2, 48), np.float32)})
    with pytest.raises(UnsupportedModelError, match=message) as error:
        load_config(find_model(str(file)))
    assert error.value.hint


def test_qwen2_written_for_the_graph_of_llama_is_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = slimgpt.export(str(tiny_checkpoint("qwen2")), tmp_path / "model.gguf").output
    with pytest.raises(UnsupportedModelError, match="biases of attn_k, attn_q, attn_v alone"):
        load_config(find_model(str(file)))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.weight"])
def test_missing_tensors_are_named(name: str, base: Path, tmp_path: Path) -> None:
    file = rewrite(base, tmp_path / "less.gguf", tensors={name: None})
    with pytest.raises(UnsupportedModelError, match=f"has no matrix {name}"):
        load_config(find_model(str(file)))


def test_damaged_files_are_errors_about_the_file(base: Path, tmp_path: Path) -> None:
    """Cut off and overwritten at many places of the header; what still loads is another matter."""
    whole = base.read_bytes()
    header = gguf.GGUFReader(base).data_offset
    random = np.random.default_rng(0)
    damaged = [b"", b"GGUF", b"{}", b"x" * 1000, whole[:-1000]]
    damaged += [whole[:end] for end in random.integers(4, header, 20)]
    for start in random.integers(4, header, 60):
        damaged.append(whole[:start] + random.bytes(8) + whole[start + 8 :])
    file, errors = tmp_path / "damaged.gguf", []
    for content in damaged:
        file.write_bytes(content)
        for load in (load_config, load_tokenizer):
            try:
                load(find_model(str(file)))
            except SlimGPTError as err:
                errors.append(err)
    assert len(errors) > len(damaged)
    assert all(error.hint for error in errors)


@pytest.mark.parametrize("order", list(gguf.GGUFEndian), ids=lambda order: order.name)
def test_arrays_are_those_that_gguf_reads(order: gguf.GGUFEndian, tmp_path: Path) -> None:
    """They are read in another way, because gguf takes seconds for a vocabulary."""
    file = tmp_path / "arrays.gguf"
    writer = gguf.GGUFWriter(file, "llama", endianess=order)
    arrays = {"text": ["", "a", "äöü 你好"], "count": [1, 2**31 - 1], "share": [0.5, -1e30]}
    arrays |= {"flags": [True, False], "one": ["x"]}
    for name, values in arrays.items():
        writer.add_array(name, values)
    writer.add_tensor("x.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = open_gguf(file), gguf.GGUFReader(file)
    assert ours.fields.keys() == theirs.fields.keys()
    for name, field in theirs.fields.items():
        assert ours.fields[name].types == field.types
        assert len(ours.fields[name].data) == len(field.data)
        assert ours.fields[name].contents() == field.contents()
    assert [t.data.tolist() for t in ours.tensors] == [t.data.tolist() for t in theirs.tensors]


@pytest.mark.parametrize(("values", "size"), [([1] * 4, 4), (["a"] * 4, 8)])
def test_arrays_longer_than_the_file(values: list[Any], size: int, tmp_path: Path) -> None:
    file = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("llama.odd", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    content = file.read_bytes()
    start = content.index(b"llama.odd") + len(b"llama.odd") + 8
    file.write_bytes(content[:start] + (2**60).to_bytes(8, "little") + content[start + 8 :])
    message = f"llama.odd has {2**60} values of {size} bytes or more, but .* bytes follow"
    with pytest.raises(ConfigError, match=message) as error:
        load_config(find_model(str(file)))
    assert error.value.hint


@pytest.mark.parametrize("command", ["eval", "prune", "export"])
def test_a_damaged_file_on_the_command_line(command: str, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("<html>not found</html>")
    code, _, err = run(command, file, *ARGUMENTS[command], *output(command, tmp_path))
    assert code == 2
    assert f"error: cannot load {file}: GGUF magic invalid" in err
    assert "hint: the file is damaged or is no GGUF file" in err


def test_the_quick_loader_reads_what_transformers_reads(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, find_names = [], gguf.get_tensor_name_map
    reader = gguf.GGUFReader

    def counted(*args: Any) -> Any:
        tables.append(args)
        return find_names(*args)

    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    quick = load_model(find_model(str(base)))
    assert len(tables) == 1
    assert gguf.GGUFReader is reader
    assert gguf.get_tensor_name_map is counted
    slow = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name)
    assert len(tables) > 10
    for name, parameter in slow.named_parameters():
        assert torch.equal(quick.get_parameter(name), parameter)
