"""GGUF files, held against llama.cpp itself."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from conftest import TEXT, Run, make_tiny_model
from llama_cpp import TEXTS, LlamaCpp, check_agreement
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

import slimgpt
from slimgpt.config import ExportConfig
from slimgpt.errors import ConfigError, ExportError, UnsupportedModelError
from slimgpt.exporting.formats import FORMATS
from slimgpt.models.pre_tokenizers import PRE_TOKENIZERS
from slimgpt.models.source import SMOLLM2_ALIAS, find_model
from slimgpt.models.tokenizer import load_tokenizer

PROMPT = [5, 17, 100]
PRUNE_OPTIONS = {"calibration": TEXT, "nsamples": 4, "seqlen": 32}

Checkpoint = Callable[[str], Path]


def fields(file: Path) -> dict[str, object]:
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(file).tensors
    }


@pytest.mark.parametrize("uniform", [None, True, False], ids=["dense", "uniform", "per-layer"])
@pytest.mark.parametrize(
    "variant",
    ["llama", "llama-mha", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen3"],
)
def test_llama_cpp_agrees(
    variant: str, uniform: bool | None, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Also: q and k are reordered by each layer's own heads, and tied heads are left out."""
    directory = tiny_checkpoint(variant)
    if uniform is not None:
        output = tmp_path / "slim"
        slimgpt.prune(str(directory), output, ratio=0.45, uniform=uniform, **PRUNE_OPTIONS)
        directory = output
    file = tmp_path / "model.gguf"
    if uniform is False and variant == "qwen3":
        with pytest.raises(ExportError, match="takes the embedding as the head") as error:
            slimgpt.export(str(directory), file, type="f32")
        assert "--uniform" in str(error.value.hint)
        assert not file.exists()
        return
    result = slimgpt.export(str(directory), file, type="f32")
    assert result.arch in ({"deci"} if uniform is False else {"llama", variant})
    heads = fields(file)[f"{result.arch}.attention.head_count"]
    assert isinstance(heads, list) == (uniform is False)
    assert result.types == {"f32": len(tensors(file))}
    check_agreement(file, AutoModelForCausalLM.from_pretrained(directory), PROMPT)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_channels(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """llama.cpp computes them wrongly: it leaves out their attention."""
    source, directory, empty = tiny_checkpoint("llama"), tmp_path / "slim", 1
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    widths = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    layers = [{key: config[key] for key in widths} for _ in range(config["num_hidden_layers"])]
    layers[empty] |= {"intermediate_size": 0}
    weights = load_file(directory / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.{empty}.mlp.{name}.weight"] = torch.empty(0, 48)
    weights[f"model.layers.{empty}.mlp.down_proj.weight"] = torch.empty(48, 0)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    pruned = {"model_type": "slimgpt_llama", "architectures": ["SlimLlamaForCausalLM"]}
    config |= pruned | {"per_layer_config": dict(enumerate(layers))}
    (directory / "config.json").write_text(json.dumps(config))
    file = slimgpt.export(str(directory), type="f32").output
    assert fields(file)["deci.feed_forward_length"] == [64, 1, 64, 64]
    expected = AutoModelForCausalLM.from_pretrained(source)
    expected.model.layers[empty].mlp.down_proj.weight.data.zero_()
    check_agreement(file, expected, PROMPT)


def wide_checkpoint(directory: Path, tokenizer: PreTrainedTokenizerFast, **options: object) -> Path:
    """A tiny LLaMA whose hidden size fills blocks of 32."""
    model = make_tiny_model("llama", hidden_size=64, num_hidden_layers=2, **options)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "per-layer"])
def test_q8_0_pads_rows_to_whole_blocks(
    pruned: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    directory = wide_checkpoint(
        tmp_path / "wide",
        tokenizer,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    if pruned:
        slimgpt.prune(str(directory), tmp_path / "slim", ratio=0.3, **PRUNE_OPTIONS)
        directory = tmp_path / "slim"
    exact = slimgpt.export(str(directory), type="f32").output
    result = slimgpt.export(str(directory), type="q8_0")
    assert result.types.keys() == {"q8_0", "f32"}
    file = result.output
    assert ("deci.block_count" in fields(file)) == pruned
    written, wanted = tensors(file), tensors(exact)
    if not pruned:
        assert file.stat().st_size < exact.stat().st_size / 2
        assert written["blk.0.attn_output.weight"].shape == (64, 96)
        assert written["blk.0.ffn_down.weight"].shape == (64, 64)
    for name, tensor in wanted.items():
        padded = np.zeros_like(written[name])
        padded[tuple(map(slice, tensor.shape))] = tensor
        error = np.abs(written[name] - padded).max()
        assert error <= np.abs(tensor).max() / 127
    top, log_probs = LlamaCpp(file).top_log_probs(PROMPT, 20)
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    # llama.cpp rounds activations to 8 bits too, which random weights make the most of.
    assert (log_probs - expected[top]).abs().max() < 0.3


def test_q8_0_needs_a_hidden_size_of_whole_blocks(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(ExportError, match="rows of 48 values, but Q8_0 has blocks of 32"):
        slimgpt.export(str(tiny_checkpoint("llama")), type="q8_0")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision(kind: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Weights that the type holds exactly give the same numbers as in PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    directory = tmp_path / "half"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    model.to(dtype).save_pretrained(directory)
    file = slimgpt.export(str(directory), type=kind).output
    expected = model.float().state_dict()
    assert np.array_equal(
        tensors(file)["blk.0.ffn_up.weight"], expected["model.layers.0.mlp.up_proj.weight"]
    )
    check_agreement(file, model, PROMPT, tolerance=0.05)


def test_values_beyond_the_type_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = tmp_path / "large"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight has values up to 100000"):
        slimgpt.export(str(directory), type="f16")
    assert not list(directory.glob("*gguf*"))
    assert slimgpt.export(str(directory), type="bf16").output.is_file()


def test_needless_and_missing_tensors(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = tmp_path / "old"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    written = tensors(slimgpt.export(str(directory), type="f32").output)
    assert len(written) == len(weights) - 1
    assert not any("rot" in name for name in written)
    del weights["model.layers.3.mlp.down_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    missing = r"lacks 1 weights .*layers\.3\.mlp\.down_proj"
    with pytest.raises(UnsupportedModelError, match=missing):
        slimgpt.export(str(directory), type="bf16")


def test_tied_heads_are_compared(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = tmp_path / "tied"
    shutil.copytree(tiny_checkpoint("llama-tied"), directory)
    weights = load_file(directory / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    only_head = weights | {"lm_head.weight": embedding}
    save_file(only_head, directory / "model.safetensors", metadata={"format": "pt"})
    written = tensors(slimgpt.export(str(directory), type="f32").output)
    assert np.array_equal(written["token_embd.weight"], embedding)
    assert "output.weight" not in written
    differs = weights | {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1}
    save_file(differs, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"ties lm_head\.weight to .*, but they differ"):
        slimgpt.export(str(directory), type="bf16")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "rope",
    [LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "per-layer"])
def test_scaled_rotary_frequencies(
    rope: dict[str, float], pruned: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    directory = wide_checkpoint(tmp_path / "rope", tokenizer, rope_parameters=rope)
    if pruned:
        slimgpt.prune(str(directory), tmp_path / "slim", ratio=0.3, **PRUNE_OPTIONS)
        directory = tmp_path / "slim"
    file = slimgpt.export(str(directory), type="f32").output
    assert ("deci.block_count" in fields(file)) == pruned
    ids = list(range(10, 70))
    check_agreement(file, AutoModelForCausalLM.from_pretrained(directory), ids)


def test_rotary_frequencies_that_llama_cpp_lacks_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    directory = wide_checkpoint(tmp_path / "rope", tokenizer, rope_parameters=rope)
    with pytest.raises(ExportError, match="rotary embeddings of type 'dynamic'"):
        slimgpt.export(str(directory))


def test_context_ends_with_the_sliding_window(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """llama.cpp has no such window in these graphs, and within it needs none."""
    file = slimgpt.export(str(tiny_checkpoint("mistral")), tmp_path / "model.gguf").output
    assert fields(file)["llama.context_length"] == 8


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_prompt_ids_of_byte_level_tokenizers(
    name: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from pydoc_data.topics import topics

    splitter, ignore_merges = PRE_TOKENIZERS[name]
    trained = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    trained.pre_tokenizer = splitter
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    trained.train_from_iterator([*topics.values(), *TEXTS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")
    check_prompt_ids(fast, tmp_path / "model", f"tokenizer.ggml.pre={name}")


def test_pieces_that_are_found_instead_of_isolated(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As in tokenizers that were converted from tiktoken."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = json.loads(PRE_TOKENIZERS["dbrx"][0].__getstate__())
    state["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    backend = Tokenizer.from_str(json.dumps(state))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    check_prompt_ids(fast, tmp_path / "model", "tokenizer.ggml.pre=dbrx")


def check_prompt_ids(
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    entry: str,
    texts: Sequence[str] = (*TEXTS, "<s>Hello</s>"),
) -> None:
    make_tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # In a directory of its own, where transformers finds no tokenizer.json to read instead.
    file = slimgpt.export(str(directory), directory / "gguf" / "model.gguf").output
    key, value = entry.split("=")
    assert fields(file)[key] == value
    expected = AutoTokenizer.from_pretrained(directory)
    ids = [expected(text).input_ids for text in texts]
    engine = LlamaCpp(file)
    assert [engine.tokenize(text) for text in texts] == ids
    read = load_tokenizer(find_model(str(file)))
    assert [read(text).input_ids for text in texts] == ids
    models_of_both = (t.backend_tokenizer.model for t in (read, expected))
    assert len({model.ignore_merges for model in models_of_both}) == 1


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True)])
def test_special_tokens_around_the_prompt(
    bos: bool, eos: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    template = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    tokens = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(template), special_tokens=tokens
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    check_prompt_ids(fast, tmp_path / "model", "tokenizer.ggml.pre=gpt-2")


def test_prompt_ids_of_sentencepiece_tokenizers(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    from sentencepiece import SentencePieceTrainer

    text = tmp_path / "text.txt"
    text.write_text("\n".join([*topics.values(), *TEXTS]))
    (tmp_path / "trained").mkdir()
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "trained" / "tokenizer"),
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path / "trained")
    # llama.cpp puts a space before every text, transformers not if there is one already.
    texts = [text for text in TEXTS if not text.startswith(" ")]
    check_prompt_ids(tokenizer, tmp_path / "model", "tokenizer.ggml.model=llama", texts)


def test_unknown_tokenizers_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory = wide_checkpoint(tmp_path / "model", tokenizer)
    file = directory / "tokenizer.json"
    state = json.loads(file.read_text())
    by_words = state | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    unmerged = state | {"model": state["model"] | {"byte_fallback": True}}
    lower = {"normalizer": {"type": "Lowercase"}}
    for broken, message in (
        (state | lower, "changes text in a way that llama.cpp does not: {'type': 'Lowercase'}"),
        (unmerged | lower, "changes text in a way that llama.cpp does not"),
        (by_words, "no known name for the way in which this tokenizer splits text"),
        (unmerged, "merges characters in a way that llama.cpp does not"),
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(ExportError, match=message):
            slimgpt.export(str(directory))


def test_nfc_is_written_with_a_warning(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = wide_checkpoint(tmp_path / "model", tokenizer)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFC"}}))
    assert slimgpt.export(str(directory)).output.is_file()
    assert "does not normalise Unicode" in caplog.text


def test_tokenizer_entries_are_copied_from_the_embedded_model(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "base.gguf", type="f32").output
    directory = tmp_path / "slim"
    slimgpt.prune(str(base), directory, ratio=0.2, **PRUNE_OPTIONS)
    report = directory / "pruning_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"base_model": SMOLLM2_ALIAS}))
    embedded = find_model(str(base))
    monkeypatch.setattr("slimgpt.exporting.gguf_tokenizer.embedded_model", lambda name: embedded)
    monkeypatch.delattr("slimgpt.exporting.gguf_tokenizer._convert")
    entries, wanted = (
        {name: value for name, value in fields(file).items() if name.startswith("tokenizer.")}
        for file in (slimgpt.export(str(directory), type="f32").output, base)
    )
    assert entries == wanted


def test_a_gguf_file_can_be_written_again(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = slimgpt.export(str(tiny_checkpoint("llama")), tmp_path / "base.gguf", type="f32").output
    again = slimgpt.export(str(base), tmp_path / "again.gguf", type="f32").output
    written, wanted = tensors(again), tensors(base)
    assert written.keys() == wanted.keys()
    assert all(np.array_equal(written[name], wanted[name]) for name in wanted)


def test_modelfile_for_ollama(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    generation = directory / "generation_config.json"
    values = json.loads(generation.read_text()) | {"temperature": 0.6, "repetition_penalty": 1.1}
    generation.write_text(json.dumps(values))
    assert slimgpt.export(str(directory)).output == directory / "tiny-f16.gguf"
    modelfile = directory / "Modelfile"
    lines = "FROM ./tiny-f16.gguf\nPARAMETER temperature 0.6\nPARAMETER repeat_penalty 1.1\n"
    assert modelfile.read_text() == lines
    modelfile.write_text("FROM mine\n")
    slimgpt.export(str(directory), type="f32")
    assert modelfile.read_text() == "FROM mine\n"
    generation.write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*generation_config.json"):
        slimgpt.export(str(directory), type="bf16")
    assert not (directory / "tiny-bf16.gguf").exists()


def test_the_formats_of_the_options_are_those_that_can_be_written() -> None:
    assert get_args(ExportConfig.model_fields["to"].annotation) == tuple(FORMATS)


def test_export_from_the_command_line(
    run: Run, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, file = tiny_checkpoint("llama"), tmp_path / "new" / "model.gguf"
    arguments = ("export", source, "--to", "gguf", "--type", "f32", "--output", file)
    code, out, _ = run(*arguments)
    assert code == 0
    assert str(file) in out
    assert "llama" in out
    written = file.stat()
    code, out, err = run(*arguments)
    assert code == 2
    assert f"{file} exists" in err
    assert file.stat() == written
    code, _, err = run("export", source, "--type", "q5_0")
    assert code == 2
    assert "did you mean 'q8_0'?" in err
    monkeypatch.setattr("slimgpt.exporting.export.find_spec", lambda name: None)
    code, _, err = run("export", source, "--output", tmp_path / "other.gguf")
    assert code == 2
    assert "slimgpt[gguf]" in err
    assert {path.name for path in file.parent.iterdir()} == {"model.gguf", "Modelfile"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
