"""Models whose stock class takes the size of a head from the hidden size, with fewer heads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, assert_greedy, sample_tokens
from families import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import slimgpt
from slimgpt.checkpoint.writer import pruned_config
from slimgpt.errors import ConfigError, ExportError, UnsupportedModelError
from slimgpt.models.blocks import bind
from slimgpt.models.units import Kept
from slimgpt.pruning.slicing import masked_sublayer

OPTIONS: dict[str, Any] = {
    "calibration": TEXT,
    "nsamples": 4,
    "seqlen": 32,
    "widths": "scheduled",
    "schedule": "uniform",
    "attention_share": 1.0,
    "refit_epochs": 0,
}

OLD_FALCON = {"new_decoder_architecture": False, "num_kv_heads": 8}

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2, other scores": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, tied": ("gpt2", {"tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox, no biases": ("gpt_neox", {"attention_bias": False}),
    "opt": ("opt", {}),
    "opt, no biases": ("opt", {"enable_bias": False}),
    "stablelm": ("stablelm", {}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "falcon, groups": ("falcon", {}),
    "falcon, biases": ("falcon", {"bias": True}),
    "falcon, one group": ("falcon", OLD_FALCON | {"multi_query": True}),
    "falcon, heads": ("falcon", OLD_FALCON | {"multi_query": False}),
    "helium": ("helium", {}),
}

Pruned = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Pruned:
    """Directories of a dense model, and of one with half of its heads and channels."""
    found: dict[str, tuple[Path, Path]] = {}

    def prune(form: str) -> tuple[Path, Path]:
        if form not in found:
            root = tmp_path_factory.mktemp("form")
            model_type, options = FORMS[form]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                tiny_config(model_type, num_hidden_layers=2, **options)
            )
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(root / "dense")
            tokenizer.save_pretrained(root / "dense")
            slimgpt.prune(str(root / "dense"), root / "slim", ratio=0.5, **OPTIONS)
            found[form] = root / "dense", root / "slim"
        return found[form]

    return prune


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **options)


def logits(model: Any) -> Tensor:
    return model(sample_tokens(2, 16), use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_it_equals_the_masked_model(form: str, pruned: Pruned) -> None:
    dense, slim = pruned(form)
    model, small = load(dense), load(slim)
    blocks = json.loads((slim / "pruning_report.json").read_text())["blocks"]
    for block, little, plan in zip(bind(model), bind(small), blocks, strict=True):
        for sublayer, sliced, decided in zip(
            block.sublayers, little.sublayers, plan["sublayers"], strict=True
        ):
            assert len(decided["keep"]) < sublayer.num_units
            kept = Kept(torch.tensor(decided["keep"]))
            masked = masked_sublayer(sublayer, kept, sliced.output.weight)
            sublayer.output.weight.copy_(masked.output.weight)
            if sublayer.output.bias is not None:
                sublayer.output.bias.copy_(sliced.output.bias)
    torch.testing.assert_close(logits(small), logits(model))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_it_is_used_like_others(form: str, pruned: Pruned, tmp_path: Path) -> None:
    _, slim = pruned(form)
    model, eager = load(slim), load(slim, attn_implementation="eager")
    expected = logits(model)
    torch.testing.assert_close(logits(eager), expected, rtol=1e-3, atol=1e-4)
    eager.set_attn_implementation("sdpa")
    assert torch.equal(logits(eager), expected)
    model.generation_config.eos_token_id = None
    assert_greedy(model, model.generate(sample_tokens(2, 8), max_new_tokens=4, do_sample=False), 4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)
    for module in model.modules():  # as those say that replace layers by their own
        if isinstance(module, torch.nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            assert module.weight.shape == (module.nx, module.nf)


@pytest.mark.parametrize("form", FORMS)
def test_it_can_be_pruned_again(form: str, pruned: Pruned, tmp_path: Path) -> None:
    _, slim = pruned(form)
    options = OPTIONS | {"ratio": 0.5}
    result = slimgpt.prune(str(slim), tmp_path / "again", **options)
    before, after = (slimgpt.inspect(directory) for directory in (slim, result.output))
    assert before.head_dim == after.head_dim == slimgpt.inspect(pruned(form)[0]).head_dim
    heads = [sum(block.num_heads for block in found.blocks) for found in (before, after)]
    assert heads[1] < heads[0]
    assert load(result.output).num_parameters() == after.params["total"]
    with pytest.raises(UnsupportedModelError, match="stock class"):
        slimgpt.prune(str(slim), tmp_path / "uniform", uniform=True, **options | {"ratio": 0.1})


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft sets it for Conv1D
@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("gpt2", "lora"),
        ("gpt_neox", "lora"),
        ("falcon, groups", "lora"),
        ("gpt2", "distill"),
        ("helium", "distill"),
    ],
)
def test_it_recovers(form: str, method: str, pruned: Pruned, tmp_path: Path) -> None:
    dense, slim = pruned(form)
    options: dict[str, Any] = {"method": method, "seqlen": 32, "tokens": 1000}
    if method == "distill":
        options["teacher"] = str(dense)
    slimgpt.recover(str(slim), tmp_path / "out", data=TEXT, eval_data=TEXT, max_steps=2, **options)
    blocks = [slimgpt.inspect(directory).blocks for directory in (slim, tmp_path / "out")]
    assert blocks[0] == blocks[1]
    found = slimgpt.evaluate(str(tmp_path / "out"), data=TEXT, seqlen=32, against=str(dense))
    assert found.perplexity[0].perplexity > 1


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft sets it for Conv1D
@pytest.mark.parametrize("method", ["magnitude", "flap", "taylor", "loraprune"])
@pytest.mark.parametrize("form", ["gpt2", "falcon, one group"])
def test_other_methods(form: str, method: str, pruned: Pruned, tmp_path: Path) -> None:
    options = {k: v for k, v in OPTIONS.items() if k not in ("widths", "refit_epochs")}
    options |= {"method": method, "ratio": 0.5}
    result = slimgpt.prune(str(pruned(form)[0]), tmp_path / "slim", **options)
    found, expected = (slimgpt.inspect(d).blocks for d in (result.output, pruned(form)[1]))
    for block, alike in zip(found, expected, strict=True):
        assert (block.num_heads, block.num_channels) == (alike.num_heads, alike.num_channels)
    assert logits(load(result.output)).isfinite().all()


@pytest.mark.parametrize("model_type", ["falcon", "gpt2", "gpt_neox", "helium", "opt", "stablelm"])
def test_a_stock_class_keeps_all_heads(model_type: str) -> None:
    config = tiny_config(model_type)
    fewer, whole = (4, 8) if model_type in ("gpt2", "gpt_neox", "opt") else (2, 4)
    stock = pruned_config(config, [(whole, 16)] * 3, uniform=True)
    assert stock.model_type == model_type
    assert not hasattr(stock, "attention_output")
    with pytest.raises(UnsupportedModelError, match="builds 8 heads of this size, not 4") as error:
        pruned_config(config, [(fewer, 16)] * 3, uniform=True)
    assert "--uniform" in str(error.value.hint)


def test_nothing_is_rebuilt_where_attention_is_whole() -> None:
    config = pruned_config(tiny_config("gpt_neox"), [(8, 16), (8, 32), (8, 64)], uniform=False)
    assert not hasattr(config, "attention_output")
    config = pruned_config(tiny_config("gpt_neox"), [(8, 16), (7, 32), (8, 64)], uniform=False)
    assert config.attention_output == "attention.dense"
    assert config.head_dim == 6
    config = pruned_config(tiny_config("llama"), [(4, 16), (3, 32), (4, 64)], uniform=False)
    assert not hasattr(config, "attention_output")


def test_export_names_the_option(pruned: Pruned, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ExportError, match="columns together") as error:
        slimgpt.export(str(pruned("gpt_neox")[1]), tmp_path / "model.gguf", type="f32")
    assert "--uniform" in str(error.value.hint)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (7, "attention_output=7"),
        ("attention.query", "cannot load a model .*query"),
        ("nowhere.dense", "cannot load a model .*nowhere"),
        ("mlp.dense_4h_to_h", "cannot load a model"),
    ],
)
def test_a_wrong_path_is_an_error_of_the_config(
    path: Any, message: str, pruned: Pruned, tmp_path: Path
) -> None:
    slim = shutil.copytree(pruned("gpt_neox")[1], tmp_path / "slim")
    values = json.loads((slim / "config.json").read_text()) | {"attention_output": path}
    (slim / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        slimgpt.inspect(slim)
