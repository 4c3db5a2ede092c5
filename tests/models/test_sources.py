"""Models as people have them: wrong configs, two sets of weights, adapters, foreign tensors."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import slimgpt
from slimgpt.errors import ConfigError, DataError, SlimGPTError, UnsupportedModelError
from slimgpt.models.device import find_device
from slimgpt.models.loading import cannot_load, load_config, load_generation_config, load_model
from slimgpt.models.source import SMOLLM2_ALIAS, Source, find_model
from slimgpt.models.tokenizer import tokenizer_files
from slimgpt.models.weights import open_weights, weight_files

Tensors = dict[str, Tensor]

PRUNE_OPTIONS = {"ratio": 0.3, "calibration": TEXT, "nsamples": 4, "seqlen": 16}
EVAL_OPTIONS = {"data": ("pydocs",), "seqlen": (16,), "max_tokens": 64}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A directory of its own with a tiny model, which a test may break."""
    return copy_of(tiny_checkpoint("llama"), tmp_path / "model")


def copy_of(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target))


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(values))


def edit_config(model: Path, **changes: Any) -> None:
    edit(model / "config.json", **changes)


def rewrite(model: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = model / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def shard(model: Path) -> None:
    """Add a second set of weights: the same in several files."""
    pieces = model.parent / "pieces"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(pieces, max_shard_size="40KB")
    for file in pieces.glob("model*"):
        shutil.copy(file, model)


def every_command(model: Path) -> list[Callable[[], Any]]:
    """What reads the weights of a model in one way or the other."""
    output = model.parent
    return [
        lambda: slimgpt.prune(model, output / "slim", **PRUNE_OPTIONS),
        lambda: slimgpt.evaluate(model, **EVAL_OPTIONS),
        lambda: slimgpt.export(model, to="gguf", output=output / "out.gguf"),
        lambda: slimgpt.recover(model, output / "better", **RECOVER_OPTIONS),
    ]


RECOVER_OPTIONS = {"data": "pydocs", "eval_data": "pydocs", "max_steps": 1, "seqlen": 16}


def assert_refused(
    model: Path, *parts: str, kind: type[SlimGPTError] = UnsupportedModelError
) -> None:
    """Every command gives one and the same error."""
    messages = set()
    for command in every_command(model):
        with pytest.raises(kind) as error:
            command()
        assert error.value.hint
        messages.add(str(error.value))
    assert len(messages) == 1
    for part in parts:
        assert part in messages.copy().pop()


# The files of a checkpoint


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".."]
)
def test_index_names_only_files_beside_it(model: Path, name: str) -> None:
    shard(model)
    (model / "model.safetensors").unlink()
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (model / INDEX).write_text(json.dumps(index))
    assert_refused(model, repr(name), INDEX)


@pytest.mark.parametrize(
    "index",
    [
        [],
        "x",
        None,
        {},
        {"weight_map": {"a": "b.safetensors"}},
        {"metadata": {}, "weight_map": []},
        {"metadata": 1, "weight_map": {"a": "b.safetensors"}},
        {"metadata": {}, "weight_map": {"a": 1}},
        {"metadata": {}, "weight_map": {"a": "\0.safetensors"}},
        {"metadata": {}, "weight_map": {"a": "\ud800.safetensors"}},
        {"metadata": {}, "weight_map": {"a": "b" * 300 + ".safetensors"}},
        {"metadata": {}, "weight_map": {}},
        {"metadata": {"a": [[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]}, "weight_map": {}},
    ],
)
def test_broken_index_is_named(model: Path, index: Any) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / INDEX).write_text(json.dumps(index))
    source = find_model(model)
    with pytest.raises(ConfigError) as error:
        open_weights(source, load_config(source))
    assert error.value.hint


def test_two_sets_of_weights_are_refused(model: Path) -> None:
    shard(model)
    assert_refused(model, "two sets of weights", "model.safetensors", INDEX)
    with pytest.raises(UnsupportedModelError, match="two sets of weights"):
        slimgpt.bench(str(model))


def test_single_file_with_an_index_is_one_set(model: Path) -> None:
    map_ = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": map_}))
    assert weight_files(find_model(model)) == [model / "model.safetensors"]


def test_other_safetensors_files_are_left_alone(model: Path) -> None:
    save_file({"foo": torch.ones(1)}, model / "consolidated.safetensors")
    assert weight_files(find_model(model)) == [model / "model.safetensors"]
    slimgpt.evaluate(str(model), **EVAL_OPTIONS)


def test_tensor_in_two_files(model: Path) -> None:
    shard(model)
    (model / "model.safetensors").unlink()
    first, second = sorted(model.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    assert_refused(model, "in another file too", kind=ConfigError)


@pytest.mark.parametrize("is_alone", [False, True])
def test_adapters_are_refused_and_the_hint_merges_them(
    model: Path, is_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copy_of(model, model.parent / "base")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if is_alone:
        shutil.rmtree(model)
    adapted.save_pretrained(model)
    assert_refused(model, "adapter", "adapter_config.json")
    with pytest.raises(UnsupportedModelError) as error:
        find_model(model)
    command = str(error.value.hint).partition(": ")[2].partition("; then")[0]
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    directory = model.parent
    monkeypatch.chdir(directory)
    exec(code, {})
    merged = load_model(find_model(directory / "merged"))
    tokens = torch.arange(8)[None]
    expected = adapted(tokens).logits
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)


# What the files hold


def with_extra(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(2, 48) for name in names}


@pytest.mark.parametrize(
    "name",
    [
        "score.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "model.mtp.0.eh_proj.weight",
        "vision_tower.patch_embedding.weight",
    ],
)
def test_tensors_that_would_be_lost_are_refused(model: Path, name: str) -> None:
    rewrite(model, with_extra(name))
    assert_refused(model, "1 tensors that its model does not use", name)


def test_layers_beyond_the_config_are_refused(model: Path) -> None:
    edit_config(model, num_hidden_layers=3)
    assert_refused(model, "num_hidden_layers=3", "4 blocks")


def test_layers_that_the_files_lack_are_refused(model: Path) -> None:
    edit_config(model, num_hidden_layers=1000)
    assert_refused(model, "num_hidden_layers=1000", "4 blocks")
    for command in (slimgpt.inspect, slimgpt.plan):  # before so many layers are built
        with pytest.raises(UnsupportedModelError, match="4 blocks"):
            command(model)


def test_config_of_a_much_larger_model_is_refused(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert_refused(model, "num_hidden_layers=32", "4 blocks")


def test_config_with_other_widths_names_both(model: Path) -> None:
    edit_config(model, intermediate_size=2**20)
    assert_refused(model, "lacks 12 weights", "48×1048576, but 48×64 in the file")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.position_ids",
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.masked_bias",
    ],
)
def test_buffers_of_older_versions_do_no_harm(model: Path, name: str) -> None:
    rewrite(model, lambda tensors: tensors | {name: torch.ones(2, dtype=torch.bool)})
    load_model(find_model(model))
    slimgpt.prune(str(model), model.parent / "slim", **PRUNE_OPTIONS)


def test_tied_head_may_be_stored_too(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = copy_of(tiny_checkpoint("llama-tied"), tmp_path / "model")
    rewrite(model, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    load_model(find_model(model))
    rewrite(model, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    assert_refused(model, "ties lm_head.weight to model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.int64, "I64"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.complex64, "C64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_types_that_are_no_weights(model: Path, dtype: torch.dtype, name: str) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(model, lambda tensors: tensors | {key: tensors[key].to(dtype)})
    assert_refused(model, key, name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "model.layers.0.mlp.up_proj.weight_scale",
        "model.layers.0.mlp.experts.down_proj_blocks",
        "model.layers.0.mlp.experts.down_proj_scales",
        "model.layers.0.mlp.up_proj.qweight",
        "model.layers.0.mlp.up_proj.SCB",
    ],
)
def test_quantised_checkpoints_are_named(model: Path, name: str) -> None:
    rewrite(model, with_extra(name))
    assert_refused(model, "is quantised", name)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq"])
def test_quantised_configs_are_named(model: Path, method: str) -> None:
    edit_config(model, quantization_config={"quant_method": method})
    assert_refused(model, "is quantised", method)


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_names_of_the_bare_decoder(
    variant: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    whole, bare = tiny_checkpoint(variant), copy_of(tiny_checkpoint(variant), tmp_path / "bare")
    rewrite(bare, without_prefix)
    expected = load_model(find_model(whole)).state_dict()
    for name, tensor in load_model(find_model(bare)).state_dict().items():
        assert torch.equal(tensor, expected[name])
    results = [
        slimgpt.prune(str(source), tmp_path / name, **PRUNE_OPTIONS)
        for name, source in (("a", whole), ("b", bare))
    ]
    a, b = (load_file(result.output / "model.safetensors") for result in results)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_checkpoint_without_a_head_is_named(model: Path) -> None:
    edit_config(model, architectures=["LlamaModel"])
    rewrite(model, lambda t: without_prefix({k: v for k, v in t.items() if k != "lm_head.weight"}))
    assert_refused(model, "LlamaModel", "no head", "lm_head.weight")


def test_token_beyond_the_embeddings(model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    live = load_model(find_model(model))
    with pytest.raises(DataError, match=r"the token 320, but .* 320 tokens, 0 to 319") as error:
        live(torch.tensor([[1, 320]]))
    assert error.value.hint


@pytest.mark.parametrize("occurs", [False, True])
def test_added_tokens_hinder_only_where_they_occur(
    model: Path, tokenizer: PreTrainedTokenizerFast, occurs: bool
) -> None:
    backend = json.loads((model / "tokenizer.json").read_text())
    words = [f"<spare {id_}>" for id_ in range(312, 321)] + [" " if occurs else "<never>"]
    for id_, word in enumerate(words, start=312):
        token = backend["added_tokens"][0] | {"id": id_, "content": word, "special": False}
        backend["added_tokens"].append(token)
    (model / "tokenizer.json").write_text(json.dumps(backend))
    for command in every_command(model)[:2]:
        if occurs:
            with pytest.raises(DataError, match="the token 321"):
                command()
        else:
            command()


# Names of models


def test_path_is_a_model(model: Path) -> None:
    assert find_model(model) == find_model(str(model))
    assert slimgpt.inspect(model) == slimgpt.inspect(str(model))
    assert isinstance(slimgpt.inspect(model).model, str)


@pytest.mark.parametrize(
    "name", ["", "x" * 5000, "a\0b", "\ud800", "x" * 300 + ".gguf", "a/" * 3000]
)
def test_names_that_no_model_has(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        slimgpt.inspect(name)
    assert error.value.hint


def test_directory_wins_over_the_embedded_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model.rename(model.with_name(SMOLLM2_ALIAS))
    monkeypatch.chdir(model.parent)
    assert slimgpt.inspect(SMOLLM2_ALIAS).params == slimgpt.inspect(f"./{SMOLLM2_ALIAS}").params
    assert "not the embedded model" in caplog.text


def test_snapshot_of_the_hub_has_the_name_of_its_repository(model: Path) -> None:
    snapshot = model.parent / "models--owner--some-model" / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    source = find_model(snapshot)
    assert (source.title, source.revision) == ("owner/some-model", "0a1b")
    relative = Source("x", os.path.relpath(snapshot))
    assert (relative.title, relative.revision) == ("owner/some-model", "0a1b")


def test_other_directories_have_their_own_name(model: Path) -> None:
    assert (find_model(model).title, find_model(model).revision) == ("model", None)


@pytest.mark.parametrize("device", ["mps", "cuda:99", "cuda:99999999999999999999"])
def test_missing_device_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=device) as error:
        find_device(device)
    assert ("CUDA" in str(error.value)) == (device == "cuda:99")
    assert error.value.hint


def test_out_of_memory_is_no_broken_file() -> None:
    problem = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1 bytes."
    )
    error = cannot_load("the weights of m", problem)
    assert "not enough memory" in str(error)
    assert "--dtype" in str(error.hint)


# Configs

WRONG = [
    ("model_type", None),
    ("model_type", 3),
    ("model_type", "nonesuch"),
    ("hidden_size", 0),
    ("hidden_size", -48),
    ("hidden_size", "48"),
    ("hidden_size", 48.0),
    ("hidden_size", None),
    ("hidden_size", True),
    ("hidden_size", 2**62),
    ("intermediate_size", 0),
    ("intermediate_size", []),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 100_000),
    ("num_hidden_layers", "four"),
    ("num_attention_heads", 0),
    ("num_attention_heads", -8),
    ("num_attention_heads", 7),
    ("num_attention_heads", {}),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", -4),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 16),
    ("num_key_value_heads", 2.5),
    ("head_dim", 0),
    ("head_dim", -8),
    ("head_dim", "x"),
    ("head_dim", 7),
    ("vocab_size", 0),
    ("vocab_size", -1),
    ("vocab_size", 1e6),
    ("max_position_embeddings", 0),
    ("max_position_embeddings", -128),
    ("max_position_embeddings", "long"),
    ("max_position_embeddings", 10**30),
    ("pad_token_id", 320),
    ("pad_token_id", -2),
    ("pad_token_id", "<pad>"),
    ("bos_token_id", 320),
    ("bos_token_id", 0.5),
    ("eos_token_id", 1000),
    ("eos_token_id", [1, 320]),
    ("eos_token_id", ["</s>"]),
    ("dtype", "float17"),
    ("dtype", "int8"),
    ("dtype", 16),
    ("hidden_act", "nonesuch"),
    ("hidden_act", 5),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", -1.0),
    ("rms_norm_eps", float("nan")),
    ("initializer_range", -0.5),
    ("attention_dropout", "none"),
    ("attention_bias", "yes"),
    ("tie_word_embeddings", "no"),
    ("rope_parameters", 10000),
    ("rope_parameters", {"rope_theta": "x"}),
    ("rope_parameters", {"rope_theta": -1.0}),
    ("rope_parameters", {"rope_type": "nonesuch"}),
    ("rope_parameters", {"rope_type": ["linear"]}),
    ("rope_scaling", {"type": "linear", "factor": "two"}),
    ("rope_scaling", {"type": "linear", "factor": 0}),
    ("rope_theta", 0),
    ("architectures", 5),
    ("per_layer_config", []),
    ("per_layer_config", {"x": {}}),
    ("per_layer_config", {"9": {"intermediate_size": 8}}),
    ("per_layer_config", {"0": 5}),
    ("per_layer_config", {"0": {"intermediate_size": -1}}),
    ("per_layer_config", {"0": {"num_attention_heads": 3, "num_key_value_heads": 2}}),
    ("per_layer_config", {"0": {"head_dim": 4}}),
    ("attn_implementation", "owner/kernel"),
    ("attn_implementation", "kernels-community/flash-attn"),
    ("_attn_implementation", "owner/kernel@main:forward"),
    ("_attn_implementation_internal", "owner/kernel"),
    ("attn_implementation", {"": "owner/kernel"}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("quantization_config", "fp8"),
    ("transformers_weights", "../other.safetensors"),
    ("configuration_files", ["config.4.0.0.json"]),
    ("num_labels", 2**31),
    ("to_dict", 5),
    ("attribute_map", {"hidden_size": "vocab_size"}),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_config_is_named(model: Path, key: str, value: Any) -> None:
    edit_config(model, **{key: value})
    for command in (slimgpt.inspect, lambda model: slimgpt.plan(model, ratio=0.3)):
        with pytest.raises(SlimGPTError) as error:
            command(model)
        assert (value if value == "nonesuch" and key == "model_type" else key) in str(error.value)
        assert error.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_key_value_heads", 3), ("pad_token_id", 320), ("attn_implementation", "owner/kernel")],
)
def test_wrong_config_is_refused_by_every_command(model: Path, key: str, value: Any) -> None:
    edit_config(model, **{key: value})
    assert_refused(model, key, kind=SlimGPTError)


def test_all_problems_of_a_config_are_in_one_message(model: Path) -> None:
    edit_config(model, hidden_size="wide", pad_token_id=999, num_key_value_heads=3)
    with pytest.raises(ConfigError) as error:
        slimgpt.inspect(model)
    assert all(
        key in str(error.value) for key in ("hidden_size", "pad_token_id", "num_key_value_heads")
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": -1},
        {"pad_token_id": None, "bos_token_id": None, "eos_token_id": [0, 1]},
        {"torch_dtype": "float16"},
        {"_attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 500000},
        {"id2label": {"0": "x"}, "something_else": [1]},
    ],
)
def test_configs_that_are_in_order(model: Path, changes: dict[str, Any]) -> None:
    edit_config(model, **changes)
    if "rope_scaling" in changes:
        values = json.loads((model / "config.json").read_text())
        values.pop("rope_parameters")
        (model / "config.json").write_text(json.dumps(values))
    slimgpt.inspect(model)


@pytest.mark.parametrize(
    "values", [{"eos_token_id": 320}, {"pad_token_id": "x"}, {"bos_token_id": [1, 999]}, [], "x"]
)
def test_wrong_generation_config_is_named(model: Path, values: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps(values))
    source = find_model(model)
    with pytest.raises(ConfigError) as error:
        load_generation_config(source, load_config(source))
    assert "generation" in str(error.value)
    assert error.value.hint


def test_error_of_the_command_line(model: Path, run: Run) -> None:
    edit_config(model, num_attention_heads=0)
    code, _, err = run("inspect", model)
    assert code == 2
    assert "error: the config of" in err
    assert "num_attention_heads=0" in err
    assert "hint: correct config.json" in err


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
KEYS = sorted(
    {key for key, _ in WRONG} | {"layer_types", "sliding_window", "id2label", "use_cache"}
)
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def succeeds_or_explains(model: Path) -> None:
    for command in (slimgpt.inspect, lambda model: slimgpt.plan(model, ratio=0.3), read_all):
        with suppress(SlimGPTError):
            command(model)


def read_all(model: Path) -> None:
    source = find_model(model)
    config = load_config(source)
    load_generation_config(source, config)
    open_weights(source, config)


@FUZZ
@given(file=st.sampled_from(["config.json", "generation_config.json", INDEX]), values=JSON)
def test_files_of_any_content(model: Path, file: str, values: Any) -> None:
    before = (model / file).read_bytes() if (model / file).exists() else None
    (model / file).write_text(json.dumps(values))
    succeeds_or_explains(model)
    (model / file).unlink()
    if before is not None:
        (model / file).write_bytes(before)


@FUZZ
@given(key=st.sampled_from(KEYS), value=JSON)
def test_configs_with_any_value(model: Path, key: str, value: Any) -> None:
    before = (model / "config.json").read_bytes()
    edit_config(model, **{key: value})
    succeeds_or_explains(model)
    (model / "config.json").write_bytes(before)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("depth", [30, 900, 100_000])
def test_files_that_are_nested_too_deeply(model: Path, file: str, depth: int) -> None:
    (model / file).write_text('{"a":' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ConfigError, match=f"cannot read .*{file}") as error:
        read_all(model)
    assert error.value.hint


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja", "merges.txt"])
def test_links_out_of_a_model_are_not_copied(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, secret = tmp_path / "model", tmp_path / "secret"
    shutil.copytree(tiny_checkpoint("llama"), model)
    secret.write_text("a key")
    (model / name).symlink_to(secret)
    with pytest.raises(UnsupportedModelError, match="outside of the model's directory") as error:
        slimgpt.prune(str(model), tmp_path / "out", calibration=TEXT, nsamples=2, seqlen=16)
    assert "put a copy" in str(error.value.hint)
    assert not list((tmp_path / "out").rglob(name))


def test_links_in_a_model_and_in_the_cache_of_the_hub_are_read(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    shutil.copytree(tiny_checkpoint("llama"), snapshot)
    blob = tmp_path / "models--a--b" / "blobs" / "1"
    blob.parent.mkdir()
    (snapshot / "tokenizer.json").rename(blob)
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/1"))
    assert tokenizer_files(find_model(snapshot)).keys() >= {"tokenizer.json"}
    shutil.move(blob, snapshot / "own.json")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("own.json")
    assert tokenizer_files(find_model(snapshot)).keys() >= {"tokenizer.json"}
