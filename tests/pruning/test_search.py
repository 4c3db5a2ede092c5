"""Searched widths: the trials, their limit, and how an interrupted search goes on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT
from interruption import fingerprint

import slimgpt
from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError
from slimgpt.models.loading import load_config
from slimgpt.models.source import find_model
from slimgpt.pruning import search
from slimgpt.pruning.plan import shapes_of
from slimgpt.pruning.search import Trial, tilted
from slimgpt.pruning.sensitivity import Measurement

OPTIONS: dict[str, Any] = {
    "calibration": TEXT,
    "nsamples": 12,
    "seqlen": 32,
    "ratio": 0.3,
    "attention_share": 0.3,
}


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """The trials that the searches of a test make."""
    made, really = [], search._try

    def attempt(*args: Any) -> Trial:
        made.append(really(*args))
        return made[-1]

    monkeypatch.setattr(search, "_try", attempt)
    monkeypatch.setattr(search, "NUM_HALVINGS", 0)
    return made


def test_the_trial_of_least_divergence_wins(
    trials: list[Trial], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = str(tiny_checkpoint("llama"))
    measured = slimgpt.prune(model, tmp_path / "measured", **OPTIONS)
    assert not trials
    result = slimgpt.prune(model, tmp_path / "searched", widths="searched", **OPTIONS)
    best = min(trials, key=lambda trial: trial.divergence)
    assert result.plan.widths == tuple(best.widths)
    assert trials[0].widths == list(measured.plan.widths)
    assert len({json.dumps(trial.widths) for trial in trials}) == len(trials) > 2
    removed = measured.plan.params_before - measured.plan.params_after
    step = measured.plan.shapes[0].sublayers[0].unit_params
    for trial in trials:
        kept = sum(
            sublayer.kept_params(width)
            for shape, block in zip(measured.plan.shapes, trial.widths, strict=True)
            for sublayer, width in zip(shape.sublayers, block, strict=True)
        )
        whole = sum(shape.params for shape in measured.plan.shapes)
        assert abs(whole - kept - removed) <= step


def test_the_budget_leaves_one_trial(
    trials: list[Trial], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    options = OPTIONS | {"widths": "searched", "search_budget": 1e-6}
    slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **options)
    assert len(trials) == 1


def test_an_interrupted_search_goes_on(
    trials: list[Trial],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, options = str(tiny_checkpoint("qwen3")), OPTIONS | {"widths": "searched"}
    slimgpt.prune(model, tmp_path / "whole", **options)
    num_trials, really = len(trials), search._try

    def fails(*args: Any) -> Trial:
        if len(trials) == num_trials + 2:
            raise KeyboardInterrupt
        return really(*args)

    with monkeypatch.context() as patch:
        patch.setattr(search, "_try", fails)
        with pytest.raises(KeyboardInterrupt):
            slimgpt.prune(model, tmp_path / "resumed", **options)
    slimgpt.prune(model, tmp_path / "resumed", **options)
    assert len(trials) == 2 * num_trials
    assert fingerprint(tmp_path / "resumed") == fingerprint(tmp_path / "whole")


def test_a_target_is_met(
    trials: list[Trial], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    options = OPTIONS | {"widths": "searched", "target_params": 90_000}
    del options["ratio"]
    result = slimgpt.prune(str(tiny_checkpoint("llama")), tmp_path / "slim", **options)
    assert len(trials) > 2
    assert result.plan.params_after <= 90_000


def test_factors_of_the_prices(tiny_checkpoint: Callable[[str], Path]) -> None:
    shapes = shapes_of(load_config(find_model(str(tiny_checkpoint("llama")))))
    costs = [[0.1, 0.2], [0.4, 0.8], [0.0, 0.2], [0.1, 0.1]]
    measurement = Measurement([], 1.0, costs, [], [[0.5, 0.5]] * 4)
    dense = measurement.prices
    assert tilted(shapes, measurement, (0, 0, 0, 0)) == dense
    by_depth = tilted(shapes, measurement, (0.3, 0, 0, 0))
    assert by_depth[0] == pytest.approx([value * math.exp(-0.3) for value in dense[0]])
    assert by_depth[3] == pytest.approx([value * math.exp(0.3) for value in dense[3]])
    attention = tilted(shapes, measurement, (0, 0.5, 0, 0))
    assert [block[1] for block in attention] == [block[1] for block in dense]
    assert attention[1][0] == pytest.approx(dense[1][0] * math.exp(0.5))
    assert attention[2][0] == 0
    contrast = tilted(shapes, measurement, (0, 0, 0.5, 0))
    assert contrast[1][1] / contrast[1][0] == pytest.approx(2 * math.sqrt(2))
    ends = tilted(shapes, measurement, (0, 0, 0, 0.6))
    assert ends[0][1] / dense[0][1] == ends[3][1] / dense[3][1] == pytest.approx(math.exp(0.4))


def test_only_a_search_has_a_budget() -> None:
    with pytest.raises(ConfigError, match="widths='measured' has no search_budget"):
        PruneConfig.create(search_budget=2)
