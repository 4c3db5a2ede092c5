"""Text models inside models that also see images, and models with a classification head."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, TINY, Run, make_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import slimgpt
from slimgpt.errors import ConfigError, SlimGPTError, UnsupportedModelError
from slimgpt.models.blocks import bind, decoder_of
from slimgpt.models.family import WRAPPER_TYPES
from slimgpt.models.loading import build_skeleton, load_config, load_model
from slimgpt.models.source import find_model
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weights import open_weights
from slimgpt.pruning.family_check import check_family

OPTIONS = {"calibration": TEXT, "nsamples": 6, "seqlen": 32, "refit_epochs": 0}

IMAGE, VIDEO, START, END = 300, 301, 302, 303  # tokens

TINY_TEXT = {**TINY, "num_hidden_layers": 2}

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 14,
}
QWEN_TEXT = {
    **TINY_TEXT,
    "hidden_size": 64,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


@dataclass(frozen=True)
class Wrapped:
    """The config of a model type, and how many tokens stand for an image."""

    config: dict[str, Any]
    num_tokens: int = 4


def _llava(text: str, tower: str = "siglip_vision_model", **options: Any) -> dict[str, Any]:
    return {
        "text_config": {**TINY_TEXT, "model_type": text},
        "vision_config": {**TOWER, "model_type": tower},
        "image_token_index": IMAGE,
        **options,
    }


CASES = {
    "gemma3": Wrapped(_llava("gemma3_text", mm_tokens_per_image=1), 1),
    "llava": Wrapped(_llava("llama", "clip_vision_model")),
    "mistral3": Wrapped(
        {
            **_llava("ministral3", spatial_merge_size=1),
            "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 8},
        }
    ),
    "qwen2_5_vl": Wrapped(
        {
            "text_config": QWEN_TEXT,
            "vision_config": {**QWEN_TOWER, "window_size": 56, "fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
        },
        1,
    ),
    "qwen3_vl": Wrapped(
        {
            "text_config": QWEN_TEXT,
            "vision_config": {
                **QWEN_TOWER,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            **QWEN_TOKENS,
        },
        1,
    ),
}
# The others are only checked, see `check_family`.
CONFIGS = {name: case.config for name, case in CASES.items()} | {
    "aya_vision": _llava("cohere2"),
    "cohere2_vision": _llava("cohere2"),
    "idefics3": _llava("llama", "idefics3_vision", scale_factor=1),
    "internvl": _llava("qwen2", "internvl_vision"),
    "llava_next": _llava("mistral", "clip_vision_model"),
    "llava_onevision": _llava("qwen2", video_token_index=VIDEO),
    "paligemma": _llava("gemma", projection_dim=48),
    "qwen2_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4},
        **QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": {**TINY_TEXT, "num_hidden_layers": 4},
        "vision_config": {**QWEN_TOWER, "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "smolvlm": _llava("llama", "smolvlm_vision", scale_factor=1),
}

TEXT_INPUTS = {"input_ids": torch.arange(5, 25)[None]}


def image_inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[5, 6, *[IMAGE] * CASES[name].num_tokens, 7, 8, 9]])
    if name.startswith("qwen"):
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": torch.randn(4, 3 * 2 * 14 * 14, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
        }
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    if name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[28, 28]])
    return inputs


def write_model(name: str, directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **CASES[name].config)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():  # norms too, and projections that start as zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (directory / file).write_text(f'{{"of": "{name}",\n"size": 28}}')
    return directory


@dataclass(frozen=True)
class Pruned:
    """Directories of a model and its two pruned versions, and the result of the first."""

    dense: Path
    slim: Path
    uniform: Path
    result: slimgpt.PruneResult


@pytest.fixture(scope="module")
def pruned(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Pruned]:
    found: dict[str, Pruned] = {}

    def prune(name: str) -> Pruned:
        if name not in found:
            root = tmp_path_factory.mktemp(name)
            dense = write_model(name, root / "dense", tokenizer)
            result = slimgpt.prune(str(dense), root / "slim", ratio=0.3, **OPTIONS)
            slimgpt.prune(str(dense), root / "uniform", ratio=0.3, uniform=True, **OPTIONS)
            found[name] = Pruned(dense, root / "slim", root / "uniform", result)
        return found[name]

    return prune


FRESH = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
auto_class = getattr(transformers, sys.argv[1])
for root in map(Path, sys.argv[2:]):
    for kind in ("slim", "uniform"):
        model, info = auto_class.from_pretrained(
            root / kind, trust_remote_code=True, output_loading_info=True
        )
        assert not any(info.values()), info
        assert type(model).__name__.startswith("Slim") == (kind == "slim")
        for file in list(root.glob("inputs-*.safetensors")):
            with torch.no_grad():
                logits = model(**load_file(file)).logits
            save_file({"logits": logits}, root / f"{kind}-{file.name}")
assert "slimgpt" not in sys.modules
"""


def run_fresh(auto_class: str, roots: dict[Path, dict[str, dict[str, Tensor]]]) -> None:
    """Load the models in a process without SlimGPT, and write the logits for some inputs."""
    for root, inputs in roots.items():
        for name, tensors in inputs.items():
            save_file(tensors, root / f"inputs-{name}.safetensors")
    modules = {"HF_MODULES_CACHE": str(next(iter(roots)) / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", FRESH, auto_class, *map(str, roots)]
    subprocess.run(command, env=os.environ | modules, check=True)


@pytest.fixture(scope="module")
def loaded(pruned: Callable[[str], Pruned]) -> Callable[[str, str, str], Tensor]:
    """The logits of a pruned model, on text or with an image, in a fresh process."""
    roots = {
        pruned(name).dense.parent: {"text": TEXT_INPUTS, "image": image_inputs(name)}
        for name in CASES
    }
    run_fresh("AutoModelForImageTextToText", roots)

    def read(name: str, kind: str, inputs: str) -> Tensor:
        file = pruned(name).dense.parent / f"{kind}-inputs-{inputs}.safetensors"
        return load_file(file)["logits"]

    return read


def mask(model: Any, small: Any, result: slimgpt.PruneResult) -> Any:
    """Give a dense model the output projections of a small one, with zeros for what was removed."""
    for block, little, plan in zip(bind(model), bind(small), result.blocks, strict=True):
        for sublayer, sliced, kept in zip(
            block.sublayers, little.sublayers, plan.sublayers, strict=True
        ):
            weight_OI = torch.zeros_like(sublayer.output.weight)
            columns = sublayer.columns(kept.kept(torch.device("cpu")))
            weight_OI[:, columns] = sliced.output.weight
            sublayer.output.weight.copy_(weight_OI)
            if sublayer.output.bias is not None:
                sublayer.output.bias.copy_(sliced.output.bias)
    return model


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_pruned_model_loads_anywhere_and_equals_masking(
    name: str, pruned: Callable[[str], Pruned], loaded: Callable[[str, str, str], Tensor]
) -> None:
    case = pruned(name)
    small = AutoModelForImageTextToText.from_pretrained(case.slim)
    dense = AutoModelForImageTextToText.from_pretrained(case.dense)
    assert case.result.plan.params_after == small.num_parameters() < dense.num_parameters()
    masked = mask(dense, small, case.result)
    for kind, inputs in (("text", TEXT_INPUTS), ("image", image_inputs(name))):
        logits = small(**inputs).logits
        torch.testing.assert_close(logits, masked(**inputs).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(loaded(name, "slim", kind), logits, rtol=0, atol=1e-5)
    blind = image_inputs(name) | {"pixel_values": 0 * image_inputs(name)["pixel_values"]}
    assert not torch.allclose(small(**blind).logits, logits, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_everything_else_is_copied(name: str, pruned: Callable[[str], Pruned]) -> None:
    case = pruned(name)
    small, uniform, dense = (
        AutoModelForImageTextToText.from_pretrained(path)
        for path in (case.slim, case.uniform, case.dense)
    )
    for model in (small, uniform):
        state, inside = model.state_dict(), {p.data_ptr() for p in decoder_of(model).parameters()}
        others = {key for key, tensor in state.items() if tensor.data_ptr() not in inside}
        assert len(others) > 20
        assert all(torch.equal(state[key], dense.state_dict()[key]) for key in others)
    for path in (case.slim, case.uniform):
        for file in ("preprocessor_config.json", "processor_config.json"):
            assert (path / file).read_bytes() == (case.dense / file).read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_a_uniform_model_is_a_stock_checkpoint(
    name: str, pruned: Callable[[str], Pruned], loaded: Callable[[str, str, str], Tensor]
) -> None:
    """The names in the file are those of the original, where they differ from the model's too."""
    case = pruned(name)
    values, before = (
        json.loads((path / "config.json").read_text()) for path in (case.uniform, case.dense)
    )
    assert "auto_map" not in values
    assert values["architectures"] == before["architectures"]
    assert values["vision_config"] == before["vision_config"] | {"dtype": "float32"}
    files = [load_file(path / "model.safetensors") for path in (case.uniform, case.dense)]
    assert files[0].keys() == files[1].keys()
    model = AutoModelForImageTextToText.from_pretrained(case.uniform)
    assert name == "qwen3_vl" or files[0].keys() - model.state_dict().keys()
    with torch.no_grad():
        for kind, inputs in (("text", TEXT_INPUTS), ("image", image_inputs(name))):
            logits = loaded(name, "uniform", kind)
            torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_calibration_has_the_positions_of_text(pruned: Callable[[str], Pruned]) -> None:
    """In the first block, the errors are those of the text model by itself."""
    case = pruned("qwen3_vl")
    model = AutoModelForImageTextToText.from_pretrained(case.dense)
    calls = []
    text = decoder_of(model)
    handle = text.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    model(**TEXT_INPUTS)
    text(**TEXT_INPUTS)
    handle.remove()
    (whole_cos, whole_sin), (cos, sin) = calls
    assert torch.equal(whole_cos, cos)
    assert torch.equal(whole_sin, sin)
    assert (cos[0, 1:] != cos[0, :-1]).any(dim=-1).all()


@pytest.mark.parametrize("model_type", WRAPPER_TYPES)
def test_the_text_model_of_every_type_is_described(model_type: str) -> None:
    check = check_family(AutoConfig.for_model(model_type, **CONFIGS[model_type]))
    checked = [s.difference for s in check.sublayers if s.difference is not None]
    assert checked
    assert max([*checked, *check.differences.values()]) < 1e-10


def test_the_type_of_all_numbers_can_be_chosen(
    pruned: Callable[[str], Pruned], tmp_path: Path
) -> None:
    options = OPTIONS | {"dtype": "bfloat16"}
    slimgpt.prune(str(pruned("llava").dense), tmp_path / "slim", ratio=0.3, **options)
    config = AutoConfig.from_pretrained(tmp_path / "slim")
    assert config.dtype == config.text_config.dtype == torch.bfloat16
    slim = AutoModelForImageTextToText.from_pretrained(tmp_path / "slim", dtype="auto")
    assert {parameter.dtype for parameter in slim.parameters()} == {torch.bfloat16}


def test_the_sensitivity_pass_needs_no_vision_tower(
    pruned: Callable[[str], Pruned], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model(pruned("llava").dense)
    config = load_config(source)
    weights = open_weights(source, config)
    skeleton = build_skeleton(config)
    weights.check(skeleton)
    streamed = StreamedModel(skeleton, weights, torch.device("cpu"))
    read, names = weights.read, []
    monkeypatch.setattr(weights, "read", lambda name: names.append(name) or read(name))
    with streamed.after_blocks() as logits:
        assert logits(torch.ones(4, TINY["hidden_size"])).shape == (4, TINY["vocab_size"])
    wanted = [
        "lm_head.weight",
        *(f"model.language_model.{n}.weight" for n in ("embed_tokens", "norm")),
    ]
    assert sorted(names) == wanted


def test_a_tensor_that_is_there_twice(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    case = pruned("llava")
    tensors = load_file(case.dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((case.dense / "config.json").read_bytes())
    with pytest.raises(UnsupportedModelError, match="are the same tensor of the model"):
        load_model(find_model(tmp_path))


def test_the_types_are_listed(run: Run) -> None:
    code, out, _ = run("families")
    assert code == 0
    assert all(model_type in out for model_type in WRAPPER_TYPES)
    assert "qwen3_vl_text" in out


def test_measured_widths_and_text_of_its_own(
    pruned: Callable[[str], Pruned], tmp_path: Path
) -> None:
    options = OPTIONS | {"calibration": "self", "nsamples": 64, "widths": "measured"}
    result = slimgpt.prune(str(pruned("llava").dense), tmp_path / "slim", ratio=0.3, **options)
    assert result.plan.is_measured


@pytest.mark.parametrize("method", ["taylor", "loraprune", "flap"])
def test_other_methods(method: str, pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "refit_epochs"}
    slimgpt.prune(
        str(pruned("llava").dense), tmp_path / "slim", ratio=0.3, method=method, **options
    )
    slim = AutoModelForImageTextToText.from_pretrained(tmp_path / "slim")
    biases = [name for name, _ in decoder_of(slim).named_parameters() if name.endswith("bias")]
    assert bool(biases) == (method == "flap")


def test_inspect_counts_what_surrounds_the_text_model(pruned: Callable[[str], Pruned]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(pruned("llava").slim)
    summary = slimgpt.inspect(pruned("llava").slim)
    inner = sum(p.numel() for p in decoder_of(model).parameters())
    assert summary.params["total"] == model.num_parameters()
    assert summary.params["head"] == 320 * 48
    assert summary.params["other"] == model.num_parameters() - inner - 320 * 48


def test_evaluated_and_recovered(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    case = pruned("gemma3")
    evaluation = slimgpt.evaluate(str(case.slim), against=str(case.dense), data=TEXT, seqlen=32)
    assert evaluation.perplexity[0].kl_divergence > 0
    assert "AutoModelForImageTextToText.from_pretrained" in (case.slim / "README.md").read_text()
    options = {"data": TEXT, "eval_data": TEXT, "seqlen": 32, "max_steps": 2, "batch_size": 4}
    rates = {"learning_rate": 0.01, "warmup_steps": 0}
    slimgpt.recover(str(case.slim), tmp_path / "out", max_examples=8, **options, **rates)
    recovered, slim = (
        AutoModelForImageTextToText.from_pretrained(path) for path in (tmp_path / "out", case.slim)
    )
    changed = {
        name
        for name, tensor in recovered.state_dict().items()
        if not torch.equal(tensor, slim.state_dict()[name])
    }
    assert changed
    assert all(".language_model.layers." in name for name in changed)
    file = "preprocessor_config.json"
    assert (tmp_path / "out" / file).read_bytes() == (case.dense / file).read_bytes()


def test_export_is_refused(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="a text model and a vision tower") as error:
        slimgpt.export(str(pruned("llava").slim), tmp_path / "x.gguf")
    assert "serve the checkpoint itself" in str(error.value.hint)


def test_a_config_with_the_text_model_at_the_top(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Qwen's checkpoints are like this."""
    dense = write_model("qwen2_5_vl", tmp_path / "dense", tokenizer)
    file = dense / "config.json"
    values = json.loads(file.read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    file.write_text(json.dumps(text | values))
    config = load_config(find_model(dense))
    assert config.get_text_config().intermediate_size == TINY["intermediate_size"]
    slimgpt.prune(str(dense), tmp_path / "slim", ratio=0.2, **OPTIONS)
    slim = AutoModelForImageTextToText.from_pretrained(tmp_path / "slim")
    assert slim.config.text_config.rope_parameters["mrope_section"] == [1, 1, 2]
    values["hidden_size"] = "wide"
    file.write_text(json.dumps(text | values))
    with pytest.raises(ConfigError, match="hidden_size='wide'"):
        load_config(find_model(dense))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("text_config", {"intermediate_size": -1}, "text model in .* intermediate_size=-1"),
        ("text_config", {"num_hidden_layers": 9}, "lacks .* weights"),
        ("text_config", {"model_type": "mamba"}, "'mamba' are not supported"),
        ("text_config", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ("vision_config", {"_attn_implementation": "someone/code"}, "remote code"),
        ("vision_config", {"hidden_size": 31}, "cannot load the config .* not a multiple"),
    ],
)
def test_wrong_configs_are_refused(
    part: str,
    values: dict[str, Any],
    message: str,
    pruned: Callable[[str], Pruned],
    tmp_path: Path,
) -> None:
    for file in pruned("llava").dense.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config[part] |= values
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlimGPTError, match=message) as error:
        load_model(find_model(tmp_path))
    assert error.value.hint


def test_a_text_config_that_is_no_object(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    config = json.loads((pruned("llava").dense / "config.json").read_text())
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": [1]}))
    with pytest.raises(ConfigError, match=r"text_config is \[1\], not an object"):
        load_config(find_model(tmp_path))


def test_names_that_transformers_changes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """GPT-NeoX calls its head ``embed_out``."""
    config = AutoConfig.for_model("gpt_neox", **TINY_TEXT)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    slimgpt.prune(str(tmp_path / "dense"), tmp_path / "slim", ratio=0.2, uniform=True, **OPTIONS)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("dense", "slim")]
    assert files[0].keys() == files[1].keys()
    assert torch.equal(files[0]["embed_out.weight"], files[1]["embed_out.weight"])


CLASSIFIERS = ["llama", "gpt2", "gemma3_text"]


@pytest.fixture(scope="module")
def classifier(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Pruned]:
    found: dict[str, Pruned] = {}

    def prune(model_type: str) -> Pruned:
        if model_type not in found:
            root = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **TINY_TEXT, num_labels=3)
            model = AutoModelForSequenceClassification.from_config(config)
            model.save_pretrained(root / "dense")
            tokenizer.save_pretrained(root / "dense")
            dense = str(root / "dense")
            options = OPTIONS | {"ratio": 0.2, "widths": "scheduled"}
            result = slimgpt.prune(dense, root / "slim", **options)
            slimgpt.prune(dense, root / "uniform", uniform=True, **options)
            found[model_type] = Pruned(root / "dense", root / "slim", root / "uniform", result)
        return found[model_type]

    return prune


@pytest.fixture(scope="module")
def classified(classifier: Callable[[str], Pruned]) -> Callable[[str, str], Tensor]:
    roots = {classifier(name).dense.parent: {"text": TEXT_INPUTS} for name in CLASSIFIERS}
    run_fresh("AutoModelForSequenceClassification", roots)

    def read(name: str, kind: str) -> Tensor:
        return load_file(classifier(name).dense.parent / f"{kind}-inputs-text.safetensors")[
            "logits"
        ]

    return read


@pytest.mark.parametrize("model_type", CLASSIFIERS)
@torch.no_grad()
def test_a_classifier_keeps_its_head(
    model_type: str,
    classifier: Callable[[str], Pruned],
    classified: Callable[[str, str], Tensor],
) -> None:
    case = classifier(model_type)
    small, uniform, dense = (
        AutoModelForSequenceClassification.from_pretrained(path)
        for path in (case.slim, case.uniform, case.dense)
    )
    assert torch.equal(small.score.weight, dense.score.weight)
    assert torch.equal(uniform.score.weight, dense.score.weight)
    assert type(uniform) is type(dense)
    assert small.config.architectures == [f"Slim{type(dense).__name__}"]
    logits = small(**TEXT_INPUTS).logits
    masked = mask(dense, small, case.result)
    torch.testing.assert_close(logits, masked(**TEXT_INPUTS).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(classified(model_type, "slim"), logits, rtol=0, atol=1e-6)
    expected = uniform(**TEXT_INPUTS).logits
    torch.testing.assert_close(classified(model_type, "uniform"), expected, rtol=0, atol=1e-6)
    assert logits.shape == (1, 3)
    assert "AutoModelForSequenceClassification" in (case.slim / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            {"calibration": "self", "widths": "measured"},
            "--calibration self and --widths measured need",
            "other texts with --calibration and --widths scheduled",
        ),
        ({"calibration": "self", "widths": "scheduled"}, "--calibration self needs", "other texts"),
        ({"widths": "measured"}, "--widths measured needs", "--widths scheduled"),
        ({"method": "taylor"}, "--method taylor needs", "another --method"),
    ],
)
def test_what_needs_predictions_of_tokens_is_refused(
    options: dict[str, str],
    message: str,
    hint: str,
    classifier: Callable[[str], Pruned],
    tmp_path: Path,
) -> None:
    given = {"calibration": TEXT, "nsamples": 64, "seqlen": 32} | options
    with pytest.raises(UnsupportedModelError, match=f"no head .*{message}") as error:
        slimgpt.prune(str(classifier("llama").dense), tmp_path / "out", ratio=0.2, **given)
    assert hint in str(error.value.hint)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, output: slimgpt.evaluate(model, data=TEXT, seqlen=32),
        lambda model, output: slimgpt.recover(model, output, data=TEXT, eval_data=TEXT, seqlen=32),
        lambda model, output: slimgpt.export(model, output / "x.gguf"),
        lambda model, output: slimgpt.bench(model, engine="transformers"),
    ],
    ids=["evaluate", "recover", "export", "bench"],
)
def test_other_commands_refuse_a_classifier(
    use: Callable[[str, Path], Any], classifier: Callable[[str], Pruned], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="no head for language modelling") as error:
        use(str(classifier("llama").slim), tmp_path / "out")
    assert error.value.hint
    assert not list(tmp_path.glob("out/*"))


def test_a_plain_model_has_no_other_parameters(tmp_path: Path) -> None:
    make_tiny_model("llama").save_pretrained(tmp_path)
    assert "other" not in slimgpt.inspect(tmp_path).params
