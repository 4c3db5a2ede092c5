"""Every model type, from its config: checked, pruned, loaded elsewhere, and used."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import TEXT, assert_greedy, sample_tokens
from families import MODEL_TYPES, tiny_config
from interruption import InterruptionError, fail_at_block, fingerprint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import slimgpt
from slimgpt.models.blocks import bind
from slimgpt.models.experts import Experts
from slimgpt.models.family import family_of
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import Kept
from slimgpt.pruning.slicing import masked_sublayer

OPTIONS = {"calibration": TEXT, "nsamples": 6, "seqlen": 32, "min_ratio": 0.3}

# Loads every directory without slimgpt and writes the logits of the same tokens.
LOAD = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM

tokens = torch.load(sys.argv[1])
for directory in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float64, experts_implementation="eager"
    )
    with torch.no_grad():
        torch.save(model(tokens, use_cache=False).logits, directory.parent / "logits.pt")
assert "slimgpt" not in sys.modules
"""

Make = Callable[[str], Path]


def make_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Make:
    """Directory with a tiny random model, written once."""
    written: dict[str, Path] = {}

    def write(model_type: str) -> Path:
        if model_type not in written:
            written[model_type] = tmp_path_factory.mktemp(model_type)
            make_model(model_type).save_pretrained(written[model_type])
            tokenizer.save_pretrained(written[model_type])
        return written[model_type]

    return write


@pytest.fixture(scope="module")
def slim(dense: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The same, pruned without refit, so that masking the dense model gives the same logits."""
    written: dict[str, Path] = {}

    def write(model_type: str) -> Path:
        if model_type not in written:
            output = tmp_path_factory.mktemp(f"slim-{model_type}") / "slim"
            options = OPTIONS | {"ratio": 0.45, "refit_epochs": 0, "query_heads": True}
            slimgpt.prune(str(dense(model_type)), output, **options)
            written[model_type] = output
        return written[model_type]

    return write


@pytest.fixture(scope="module")
def loaded(slim: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tensor]:
    """Logits of every pruned model in a process without slimgpt."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.pt"
    torch.save(sample_tokens(2, 16), tokens)
    directories = [slim(model_type) for model_type in MODEL_TYPES]
    subprocess.run([sys.executable, "-c", LOAD, tokens, *directories], check=True)
    return lambda model_type: torch.load(slim(model_type).parent / "logits.pt")


class Masked(nn.Module):
    """Takes the place of a sublayer with experts."""

    def __init__(self, sublayer: Sublayer) -> None:
        super().__init__()
        self.sublayer = sublayer

    def forward(self, hidden: Tensor) -> Tensor:
        return self.sublayer.forward(hidden)


def masked_logits(dense: Path, output: Path) -> Tensor | None:
    """Logits of the dense model with the new weights, where the removed units have no effect.

    None if the removed units change what the others compute.
    """
    model, slim = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float64, experts_implementation="eager")
        for d in (dense, output)
    )
    blocks = json.loads((output / "pruning_report.json").read_text())["blocks"]
    for block, small, plan in zip(bind(model), bind(slim), blocks, strict=True):
        sublayers = zip(block.sublayers, small.sublayers, plan["sublayers"], strict=True)
        for sublayer, sliced, decided in sublayers:
            if sublayer.spec.couples_units:
                return None
            parts = torch.tensor(decided["parts"]) if decided.get("parts") else None
            kept = Kept(torch.tensor(decided["keep"]), parts)
            if isinstance(sublayer, Experts):
                masked = masked_sublayer(sublayer, kept, sliced.weights.down_proj)
                block.module.set_submodule(sublayer.spec.module, Masked(masked))
                continue
            masked = masked_sublayer(sublayer, kept, sliced.output.weight)
            sublayer.output.weight.copy_(masked.output.weight)
            if sublayer.output.bias is not None:
                sublayer.output.bias.copy_(sliced.output.bias)
    return model(sample_tokens(2, 16), use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_loaded_elsewhere_it_equals_the_masked_model(
    model_type: str, dense: Make, slim: Make, loaded: Callable[[str], Tensor]
) -> None:
    logits, expected = loaded(model_type), masked_logits(dense(model_type), slim(model_type))
    assert logits.isfinite().all()
    if expected is None:  # then the pipeline's own form was compared in the check
        assert model_type in ("olmo2", "olmo3")
        return
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_generation_and_inspection(model_type: str, slim: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(slim(model_type))
    assert_greedy(model, model.generate(sample_tokens(2, 8), max_new_tokens=4, do_sample=False), 4)
    summary = slimgpt.inspect(slim(model_type))
    assert summary.params["total"] == model.num_parameters()
    assert len({(block.num_experts, block.num_channels) for block in summary.blocks}) > 1


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_uniform_results_load_with_the_stock_class(
    model_type: str, dense: Make, tmp_path: Path
) -> None:
    options = OPTIONS | {"min_ratio": None, "uniform": True, "method": "random"}
    attention = family_of(model_type).prunable_attention(tiny_config(model_type))
    is_rebuilt = attention is not None and attention[1].rebuilt  # then attention stays whole
    ratio = 0.2 if is_rebuilt else 0.4
    result = slimgpt.prune(str(dense(model_type)), tmp_path / "slim", ratio=ratio, **options)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert model.config.model_type == model_type
    plan, widths = result.plan, {}
    for sublayer, width in zip(
        chain.from_iterable(shape.sublayers for shape in plan.shapes),
        chain.from_iterable(plan.widths),
        strict=True,
    ):
        if sublayer.kind == "attention" and is_rebuilt:
            assert width == sublayer.num_units
        elif not sublayer.is_fixed:
            assert width != sublayer.num_units
            widths.setdefault(sublayer.kind, set()).add(width)
    assert all(len(found) == 1 for found in widths.values())
    expected = masked_logits(dense(model_type), result.output)
    if expected is not None:
        model.set_experts_implementation("eager")
        logits = model.double()(sample_tokens(2, 16), use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_resumed_run_gives_the_same_files(
    model_type: str, dense: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"ratio": 0.4, "refit_epochs": 1, "widths": "scheduled"}
    whole = slimgpt.prune(str(dense(model_type)), tmp_path / "whole", **options).output
    fail_at_block(2, InterruptionError(), monkeypatch)
    with pytest.raises(InterruptionError):
        slimgpt.prune(str(dense(model_type)), tmp_path / "resumed", **options)
    monkeypatch.undo()
    resumed = slimgpt.prune(str(dense(model_type)), tmp_path / "resumed", **options).output
    assert fingerprint(resumed) == fingerprint(whole)
