"""Several sizes of one model, and the curve of a sweep."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from interruption import InterruptionError, fail_at_block, fingerprint

import slimgpt
from slimgpt.errors import ConfigError, OtherRunError
from slimgpt.pruning import sizes
from slimgpt.solver.elimination import eliminate_channels, eliminate_units
from slimgpt.solver.hessian import prepare

RATIOS = (0.2, 0.35, 0.45)
OPTIONS: dict[str, Any] = {
    "calibration": TEXT,
    "nsamples": 12,
    "seqlen": 32,
    "attention_share": 0.5,
}


def is_part(small: slimgpt.PruneResult, large: slimgpt.PruneResult) -> bool:
    pairs = zip(small.blocks, large.blocks, strict=True)
    return all(
        set(ours.keep) <= set(theirs.keep)
        for blocks in pairs
        for ours, theirs in zip(*(block.sublayers for block in blocks), strict=True)
    )


@pytest.mark.parametrize("method", ["slimgpt", "wanda-sp"])
def test_each_size_is_a_part_of_the_larger(
    method: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, options = str(tiny_checkpoint("llama")), OPTIONS | {"method": method}
    results = slimgpt.prune_family(model, tmp_path / "family", RATIOS[::-1], **options)
    names = [f"ratio-{ratio:g}" for ratio in RATIOS]
    assert [result.output.name for result in results] == names
    assert sorted(path.name for path in (tmp_path / "family").iterdir()) == names
    params = [result.plan.params_after for result in results]
    assert params == sorted(params, reverse=True)
    for ratio, result in zip(RATIOS, results, strict=True):
        assert result.plan.block_ratio == pytest.approx(ratio, abs=0.03)
        assert json.loads((result.output / "config.json").read_text())
    assert is_part(results[1], results[0])
    assert is_part(results[2], results[1])


def test_the_first_size_is_that_of_prune_with_the_shared_measurement(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, options = str(tiny_checkpoint("llama")), OPTIONS | {"widths": "scheduled"}
    alone = slimgpt.prune(model, tmp_path / "alone", ratio=RATIOS[0], **options)
    first, *_ = slimgpt.prune_family(model, tmp_path / "family", RATIOS, **options)
    assert fingerprint(first.output) == fingerprint(alone.output)


@pytest.mark.parametrize("while_measuring", [True, False])
def test_an_interrupted_family_goes_on(
    while_measuring: bool,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = str(tiny_checkpoint("llama"))
    whole = slimgpt.prune_family(model, tmp_path / "whole", RATIOS, **OPTIONS)
    with monkeypatch.context() as patch:
        fail_at_block(2, InterruptionError(), patch, while_measuring)
        with pytest.raises(InterruptionError):
            slimgpt.prune_family(model, tmp_path / "resumed", RATIOS, **OPTIONS)
    resumed = slimgpt.prune_family(model, tmp_path / "resumed", RATIOS, **OPTIONS)
    assert [fingerprint(r.output) for r in resumed] == [fingerprint(r.output) for r in whole]
    with monkeypatch.context() as patch:  # nothing is done again
        fail_at_block(0, InterruptionError(), patch)
        again = slimgpt.prune_family(model, tmp_path / "whole", RATIOS, **OPTIONS)
    assert [result.report for result in again] == [result.report for result in whole]
    with pytest.raises(OtherRunError, match=r"ratio-0\.2 was made with other options: seed"):
        slimgpt.prune_family(model, tmp_path / "whole", RATIOS, **OPTIONS, seed=1)


def test_sweep(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, really = str(tiny_checkpoint("llama")), sizes._point
    points = slimgpt.sweep(model, tmp_path / "sweep", RATIOS, **OPTIONS)
    assert [point.ratio for point in points] == list(RATIOS)
    assert 0 < points[0].divergence < points[1].divergence < points[2].divergence
    assert points[0].params > points[1].params > points[2].params
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["sweep.csv", "sweep.svg"]
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == [vars(point) for point in points]

    made = []

    def point(*args: Any) -> slimgpt.SweepPoint:
        if len(made) == 1:
            raise InterruptionError
        made.append(really(*args))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sizes, "_point", point)
        with pytest.raises(InterruptionError):
            slimgpt.sweep(model, tmp_path / "resumed", RATIOS, **OPTIONS)
    assert slimgpt.sweep(model, tmp_path / "resumed", RATIOS, **OPTIONS) == points


@pytest.mark.parametrize(
    ("ratios", "options", "message"),
    [
        ([0.2], {}, r"ratios=0\.2 are not several"),
        ([0.2, 0.2], {}, "not several"),
        (RATIOS, {"ratio": 0.3}, "nothing to decide to ratio"),
        (RATIOS, {"target_params": 10_000}, "nothing to decide to target_params"),
        (RATIOS, {"query_heads": True}, "query_heads=False"),
        (RATIOS, {"preset": "paper"}, "channel_selection='greedy'"),
    ],
)
def test_sizes_that_make_no_family(
    ratios: list[float],
    options: dict[str, Any],
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=message):
        slimgpt.prune_family(
            str(tiny_checkpoint("llama")), tmp_path / "family", ratios, **OPTIONS | options
        )
    assert not (tmp_path / "family").exists()


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.data())
def test_units_that_go_first(seed: int, size: int, data: st.DataObject) -> None:
    """The weight is the least-squares solution on what is left, whatever went first."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(64, 12, generator=generator, dtype=torch.float64)
    weight_OI = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    problem = prepare(weight_OI, x_TI.T @ x_TI / 64)
    num_units = 12 // size
    first = data.draw(st.lists(st.integers(0, num_units - 1), unique=True, max_size=num_units - 1))
    num_remove = data.draw(st.integers(len(first), num_units - 1))
    units = torch.tensor(sorted(first), dtype=torch.long)
    if size == 1:
        left = eliminate_channels(problem, num_remove, first=units)
    else:
        left = eliminate_units(problem, num_remove, size, first=units)
    kept_K = left.kept_K
    assert not set((kept_K // size).tolist()) & set(first)
    assert len(kept_K) == 12 - num_remove * size
    hessian_II = torch.linalg.inv(problem.inverse_II)
    expected = weight_OI @ hessian_II[:, kept_K] @ hessian_II[kept_K][:, kept_K].inverse()
    torch.testing.assert_close(left.weight_OK, expected, rtol=1e-6, atol=1e-8)
    change = weight_OI.clone()
    change[:, kept_K] -= expected
    lost = (change @ hessian_II @ change.T).trace()
    torch.testing.assert_close(left.errors.sum(), lost, rtol=1e-6, atol=1e-8)
