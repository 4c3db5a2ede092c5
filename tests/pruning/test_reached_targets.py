"""Targets, from the options to the size of the written files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT, TINY, Run, make_tiny_model
from families import MODEL_TYPES, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import slimgpt
from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError, ExportError
from slimgpt.models.family import load_families

OPTIONS: dict[str, Any] = {"calibration": TEXT, "nsamples": 12, "seqlen": 32, "refit_epochs": 0}
BASELINE = {"method": "flap"} | {k: v for k, v in OPTIONS.items() if k != "refit_epochs"}

Checkpoint = Callable[[str], Path]


def largest_step(planned: slimgpt.PrunePlan, multiple_of: int = 8) -> int:
    """Parameters of the coarsest unit: a group, or a step of channels."""
    attention, ffn = planned.shapes[0].sublayers
    return max(attention.unit_params, multiple_of * ffn.unit_params)


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """A tiny LLaMA whose hidden size fills blocks of 32."""
    directory = tmp_path_factory.mktemp("wide")
    make_tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("widths", ["scheduled", "measured"])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "llama-biases"])
def test_parameters(variant: str, widths: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = str(tiny_checkpoint(variant))
    options = OPTIONS | {"target_params": "75k", "widths": widths}
    result = slimgpt.prune(model, tmp_path / "slim", **options)
    count = AutoModelForCausalLM.from_pretrained(result.output).num_parameters()
    assert count == result.plan.params_after <= 75_000
    assert 75_000 - count < largest_step(result.plan)
    assert result.plan.is_measured == (widths == "measured")
    target = result.report["target"]
    assert (target["option"], target["asked"], target["reached"]) == (
        "target_params",
        75_000,
        count,
    )
    assert result.plan.target_ratio == result.plan.block_ratio
    line = f"{count:,} parameters, asked for 75,000 at most"
    assert f"| Reached for --target-params | {line} |" in (result.output / "README.md").read_text()


@pytest.mark.parametrize(
    ("num_bytes", "options"),
    [
        (160_000, {"dtype": "bfloat16"}),
        (310_000, {"widths": "scheduled"}),
        (310_000, {"uniform": True}),
        (310_000, {"max_shard_size": "50kB"}),
    ],
    ids=["measured", "scheduled", "uniform", "shards"],
)
def test_bytes_of_the_files(
    num_bytes: int, options: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model, options = str(tiny_checkpoint("llama")), {"target_size": num_bytes} | options
    planned = slimgpt.plan(model, **options)
    result = slimgpt.prune(model, tmp_path / "slim", **OPTIONS | options)
    written = weight_bytes(result.output)
    assert written == result.report["target"]["reached"]
    size, count = (2, 1) if "dtype" in options else (4, 4 if "uniform" in options else 1)
    assert num_bytes - largest_step(planned) * size * count - 5000 < written <= num_bytes
    assert planned.target is not None
    assert num_bytes >= planned.target.reached
    assert abs(planned.target.reached - written) < largest_step(planned) * size * count + 5000
    assert (len(list(result.output.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)


def test_biases_that_a_method_adds_count(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, dense = str(tiny_checkpoint("llama")), 104_880
    added = 2 * TINY["num_hidden_layers"] * TINY["hidden_size"]
    with pytest.raises(ConfigError, match=f"the model has {dense + added:,} parameters"):
        slimgpt.plan(model, method="flap", target_params=dense + added + 1)
    result = slimgpt.prune(model, tmp_path / "slim", **BASELINE | {"target_params": "75k"})
    count = AutoModelForCausalLM.from_pretrained(result.output).num_parameters()
    assert 75_000 - largest_step(result.plan) < count <= 75_000


@pytest.mark.parametrize("widths", ["scheduled", "measured"])
@pytest.mark.parametrize(("share", "heads"), [("0.5x", 8), ("0.7x", 11), ("30%", 4), (1, 16)])
def test_key_value_heads(
    share: Any, heads: int, widths: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = str(tiny_checkpoint("llama"))
    options = OPTIONS | {"target_kv_cache": share, "widths": widths}
    result = slimgpt.prune(model, tmp_path / "slim", **options)
    assert sum(width[0] for width in result.plan.widths) == heads
    assert all(width[1] == TINY["intermediate_size"] for width in result.plan.widths)
    assert result.report["target"]["reached"] == heads / 16


def test_a_single_key_value_head_stays(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_tiny_model("llama", num_key_value_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the least with these options is 1x of the dense KV"):
        slimgpt.plan(str(tmp_path), target_kv_cache=0.5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_model_types(model_type: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config(model_type)).save_pretrained(tmp_path)
    whole = slimgpt.plan(str(tmp_path), ratio=0)
    limit = whole.params_before - sum(shape.params for shape in whole.shapes) // 4
    planned = slimgpt.plan(str(tmp_path), target_params=limit)
    assert planned.target is not None
    assert planned.target.reached == planned.params_after
    assert limit - largest_step(planned) < planned.params_after <= limit
    attention = load_families()[model_type].prunable_attention(tiny_config(model_type))
    if attention is None:
        with pytest.raises(ConfigError, match="stays whole"):
            slimgpt.plan(str(tmp_path), target_kv_cache="0.5x")
        return
    if attention[1].rebuilt:
        with pytest.raises(ConfigError, match="stays whole with --uniform"):
            slimgpt.plan(str(tmp_path), target_kv_cache="0.5x", uniform=True)
    halved = slimgpt.plan(str(tmp_path), target_kv_cache="0.5x")
    assert halved.target is not None
    assert halved.target.reached == 0.5
    assert halved.params_after < whole.params_before


@pytest.mark.parametrize("uniform", [False, True], ids=["per-layer", "uniform"])
@pytest.mark.parametrize("type_name", ["f32", "f16", "q8_0"])
def test_bytes_of_the_gguf_file(type_name: str, uniform: bool, wide: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    limit = {"f32": 700_000, "f16": 370_000, "q8_0": 210_000}[type_name]
    options = {"target_size": limit, "target_type": type_name.upper(), "uniform": uniform}
    result = slimgpt.prune(wide, tmp_path / "slim", **OPTIONS | options)
    exported = slimgpt.export(str(result.output), type=type_name)
    assert exported.num_bytes <= result.report["target"]["reached"] <= limit
    step = largest_step(result.plan, 32 if type_name == "q8_0" else 8)
    count = len(result.plan.widths) if uniform else 1
    size = {"f32": 4, "f16": 2, "q8_0": 34 / 32}[type_name]
    assert limit - exported.num_bytes < step * size * count + 3000


def test_gguf_files_that_cannot_be_predicted(
    wide: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("gguf")
    file = slimgpt.export(wide, tmp_path / "dense.gguf").output
    with pytest.raises(ExportError, match="cannot be predicted") as error:
        slimgpt.plan(str(file), target_size="200kB", target_type="f16")
    assert "--target-params" in str(error.value.hint)
    make_tiny_model("qwen3", num_hidden_layers=2).save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    with pytest.raises(ExportError, match="takes the embedding as the head") as error:
        slimgpt.plan(str(tmp_path / "qwen3"), target_size="100kB", target_type="f16")
    assert "--uniform" in str(error.value.hint)


@pytest.mark.parametrize("options", [{"target_params": "85k"}, {"ratio": 0.3}])
@pytest.mark.parametrize("query_heads", [False, True], ids=["groups", "query heads"])
def test_measured_widths_for_two_devices(
    query_heads: bool, options: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    options = OPTIONS | options | {"tensor_parallel": 2, "query_heads": query_heads}
    result = slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **options)
    assert result.plan.is_measured
    for layer in AutoConfig.from_pretrained(result.output).per_layer_config:
        assert layer.num_key_value_heads % 2 == 0
        assert layer.num_attention_heads % 2 == 0
        assert layer.intermediate_size % 16 == 0
    if "target_params" in options:
        assert result.plan.params_after <= 85_000


def test_the_command_line(run: Run, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    start = ("prune", tiny_checkpoint("llama"))
    code, out, _ = run(*start, "--dry-run", "--target-params", "75k")
    assert code == 0
    assert "parameters, asked for 75,000 at most" in out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("target-kv-cache: 0.5x\ntensor-parallel: 2\n")
    code, out, _ = run(*start, "--dry-run", "--json", "--recipe", recipe)
    planned = json.loads(out)
    assert planned["target"] == {
        "option": "target_kv_cache",
        "asked": 0.5,
        "reached": 0.5,
        "unit": "of the dense KV cache",
    }
    assert planned["widths"] == [[2, 64]] * 4
    code, _, err = run(*start, "--dry-run", "--target-size", "100kB")
    assert code == 2
    named = err.split("hint: ask for ")[1].split(" bytes")[0].replace(",", "")
    code, out, _ = run(*start, "--dry-run", "--target-size", named, "--json")
    assert code == 0
    assert json.loads(out)["target"]["reached"] == int(named)
    code, _, err = run(*start, "--dry-run", "--ratio", "0.1", "--tensor-parallel", "3")
    assert code == 2
    assert "must go for tensor_parallel=3" in err
    shared = ("--tensor-parallel", "4", "--multiple-of", "1")
    code, out, _ = run(*start, "--dry-run", "--json", "--ratio", "0.2", *shared)
    assert code == 0
    assert all(w[0] == 4 and w[1] % 4 == 0 for w in json.loads(out)["widths"])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80M", 80_000_000),
        ("1.2b", 1_200_000_000),
        ("75 k", 75_000),
        ("2T", 2 * 10**12),
        ("80,000,000", 80_000_000),
        ("81_430_848", 81_430_848),
        (5, 5),
    ],
)
def test_numbers_of_parameters(text: Any, count: int) -> None:
    assert PruneConfig.create(target_params=text).target_params == count


@pytest.mark.parametrize(
    ("text", "factor"), [("0.5x", 0.5), ("50%", 0.5), (".25", 0.25), ("1", 1), (0.3, 0.3)]
)
def test_factors(text: Any, factor: float) -> None:
    config = PruneConfig.create(target_kv_cache=text, preset="paper")
    assert config.target_kv_cache == factor
    assert config.schedule == "uniform"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_params": "80Q"}, "target_params='80Q': not a number"),
        ({"target_params": "1.5"}, "target_params='1.5': not a whole number"),
        ({"target_params": "0"}, "target_params=0: Input should be greater"),
        ({"target_params": "1" * 400}, "not a number"),
        ({"target_size": "12XB"}, "target_size='12XB': could not interpret"),
        ({"target_size": "1MB", "target_type": "Q4_K_M"}, "available: auto, f32, f16, bf16, q8_0"),
        ({"target_type": "q8_0"}, "without target_size, target_type='q8_0' does nothing"),
        ({"target_kv_cache": "half"}, "target_kv_cache='half': not a fraction"),
        ({"target_kv_cache": "2x"}, "target_kv_cache=2.0: Input should be less than or equal"),
        ({"target_kv_cache": "0.5x", "query_heads": True}, "query_heads=True has no place"),
        (
            {"target_size": "1MB", "target_type": "f16", "query_heads": True},
            "query_heads=True has no place",
        ),
        ({"target_kv_cache": "0.5x", "attention_share": 0.5}, "nothing to decide to attention_sh"),
        ({"target_params": "1M", "ratio": 0.2}, "give one of ratio and target_params"),
        ({"target_params": "1M", "layer_ratios": [0.1]}, "give one of layer_ratios and target"),
        ({"target_params": "1M", "target_size": "1MB"}, "give one of target_params and target_s"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PruneConfig.create(**options)
    assert message in str(error.value)
    assert error.value.hint
