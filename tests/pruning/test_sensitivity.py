"""What errors cost the output, against differences; and the widths that follow from it."""

import copy
import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, VARIANTS, make_tiny_model, prune_blocks
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

import slimgpt
from slimgpt.allocation.reallocation import move_units
from slimgpt.allocation.shapes import BlockWidths
from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError, NumericalError
from slimgpt.models.blocks import bind
from slimgpt.models.loading import build_skeleton
from slimgpt.models.source import find_model
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.units import unit_columns
from slimgpt.models.weights import open_weights
from slimgpt.pruning import sensitivity
from slimgpt.pruning.decisions import SavedBlock
from slimgpt.pruning.sensitivity import divergence as divergence_of
from slimgpt.pruning.sensitivity import sensitivities

OPTIONS = {
    "calibration": TEXT,
    "nsamples": 12,
    "seqlen": 32,
    "ratio": 0.3,
    "attention_share": 0.3,
}


def divergence(model: PreTrainedModel, changed: PreTrainedModel, samples: Tensor) -> float:
    logits = (m(samples, use_cache=False).logits.double() for m in (changed, model))
    ours, dense = (log_softmax(values, dim=-1) for values in logits)
    return kl_div(ours, dense, reduction="sum", log_target=True).item() / samples.numel()


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "llama-biases", "mistral", "qwen3"])
def test_costs_are_derivatives(
    variant: str, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(variant)
    samples = torch.randint(320, (24, 32), generator=torch.Generator().manual_seed(1))
    small, widths = copy.deepcopy(model), [(3, 40), (4, 48)] * 2
    plans = prune_blocks(small, samples, widths, PruneConfig.create(refit_epochs=0))
    source = find_model(str(tiny_checkpoint(variant)))
    weights = open_weights(source, model.config)
    skeleton = build_skeleton(model.config)
    weights.check(skeleton)
    streamed = StreamedModel(skeleton, weights, torch.device("cpu"))
    saved = [SavedBlock(plan, small.get_parameter) for plan in plans]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    found, costs = sensitivities(streamed, saved, samples)
    assert found == divergence_of(streamed, saved, samples)
    assert found == pytest.approx(divergence(model, small, samples), rel=1e-4)
    values = list(chain.from_iterable(costs))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    coarse = list(chain.from_iterable(sensitivities(streamed, saved, samples)[1]))
    assert coarse != values
    assert coarse == pytest.approx(values, abs=0.2 * max(values))

    changes = []
    for block, plan in zip(bind(model), plans, strict=True):
        for sublayer, decided in zip(block.sublayers, plan.sublayers, strict=True):
            name = f"{sublayer.output_name}.weight"
            new = torch.zeros_like(model.get_parameter(name))
            columns = unit_columns(torch.tensor(decided.keep), sublayer.unit_size)
            new[:, columns] = small.get_parameter(name)
            changes.append((name, name, new - model.get_parameter(name)))
            if sublayer.output.bias is not None:
                bias = f"{sublayer.output_name}.bias"
                change = small.get_parameter(bias) - model.get_parameter(bias)
                changes.append((name, bias, change))

    def at(name: str, factor: float) -> float:
        other = copy.deepcopy(model)
        for of, n, change in changes:
            other.get_parameter(n).add_((factor if of == name else 1) * change)
        return divergence(model, other, samples)

    step = 0.01
    assert values[2] == values[6] == 0
    for name, value in zip(dict.fromkeys(of for of, *_ in changes), values, strict=True):
        expected = (at(name, 1 + step) - at(name, 1 - step)) / (2 * step)
        assert value == pytest.approx(expected, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("query_heads", [False, True], ids=["groups", "query heads"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_units_move_and_the_sum_stays(
    variant: str, query_heads: bool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, options = str(tiny_checkpoint(variant)), OPTIONS | {"query_heads": query_heads}
    planned = slimgpt.plan(model, **options)
    result = slimgpt.prune(model, tmp_path / "slim", **options)
    assert result.plan.widths != planned.widths
    step = planned.shapes[0].sublayers[0].unit_params
    assert abs(result.plan.params_after - planned.params_after) <= step / 2
    heads = planned.shapes[0].sublayers[0].parts
    kept = [(len(b.sublayers[0].keep), len(b.sublayers[0].parts)) for b in result.blocks]
    widths = [w[0] if isinstance(w[0], tuple) else (w[0], 0) for w in result.plan.widths]
    assert kept == [(groups, groups * left) for groups, left in widths]
    assert all(left < (heads if query_heads else 1) for _, left in widths)
    assert [len(b.sublayers[1].keep) for b in result.blocks] == [w[1] for w in result.plan.widths]
    assert result.report["widths"] == json.loads(json.dumps(result.plan.widths))


def test_the_others_give_for_the_only_ffn_that_matters(tmp_path: Path, tokenizer: object) -> None:
    model = make_tiny_model("llama")
    for index in (0, 2, 3):
        model.model.layers[index].mlp.down_proj.weight.mul_(1e-3)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = OPTIONS | {"attention_share": 0}
    planned = slimgpt.plan(str(tmp_path / "dense"), **options)
    result = slimgpt.prune(str(tmp_path / "dense"), tmp_path / "slim", **options)
    before, after = ([w[1] for w in p.widths] for p in (planned, result.plan))
    assert after[1] > before[1]
    assert all(a <= b for i, (a, b) in enumerate(zip(after, before, strict=True)) if i != 1)


def test_nothing_to_remove_needs_no_gradient(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "sensitivities", lambda *_: pytest.fail("computed"))
    options = OPTIONS | {"ratio": 0}
    result = slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **options)
    assert result.plan.params_after == result.plan.params_before


@pytest.mark.parametrize(("nsamples", "is_measured"), [(4, False), (5, True)])
def test_fewer_tokens_than_channels_measure_nothing(
    nsamples: int,
    is_measured: bool,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The pass has the first of four samples of 32 tokens, or two of five, for 64 channels."""
    model, options = str(tiny_checkpoint("llama")), OPTIONS | {"nsamples": nsamples}
    planned = slimgpt.plan(model, **options)
    result = slimgpt.prune(model, tmp_path / "slim", **options)
    assert planned.is_measured == result.plan.is_measured == is_measured
    assert result.report["is_measured"] == is_measured
    assert (result.plan.widths != planned.widths) == is_measured
    assert ("takes 5 samples of 32 tokens at least, and there are 4" in caplog.text) != is_measured


def test_gradients_that_overflow(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sensitivity, "sensitivities", lambda _, blocks, *__: (1.0, [[math.nan] * 2] * len(blocks))
    )
    with pytest.raises(NumericalError, match="overflow"):
        slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **OPTIONS)


@pytest.mark.parametrize(
    "options", [{"uniform": True}, {"layer_ratios": [0.1]}, {"method": "magnitude"}]
)
def test_where_widths_are_given_nothing_is_measured(options: dict) -> None:
    assert PruneConfig.create(**options).widths == "scheduled"
    with pytest.raises(ConfigError, match="measured"):
        PruneConfig.create(widths="measured", **options)


def test_what_seems_to_cost_less_than_nothing_is_not_free(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = []

    def move(*args: Any, **rules: Any) -> list[BlockWidths]:
        prices.extend(chain.from_iterable(args[3]))
        return move_units(*args, **rules)

    monkeypatch.setattr(sensitivity, "move_units", move)
    monkeypatch.setattr(
        sensitivity, "sensitivities", lambda _, blocks, *__: (1.0, [[-0.01, 0.1]] * len(blocks))
    )
    slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **OPTIONS)
    assert min(prices) >= 0
    assert max(prices[::2]) > 0
