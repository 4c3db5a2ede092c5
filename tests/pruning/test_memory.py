"""The memory estimate, compared with what is allocated."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from slimgpt.pruning.memory import solver_bytes
from slimgpt.solver.hessian import Target, prepare


def peak_bytes(profiler: Any) -> int:
    """Most bytes of tensors that were allocated at the same time."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for _, num_bytes in changes:
        total += num_bytes
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("corrects", [False, True])
def test_matrices_of_the_preparation(corrects: bool, has_bias: bool) -> None:
    num_out, num_in = 512, 2048
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        hessian_II = torch.eye(num_in, dtype=torch.float64)
        target = None
        if corrects:
            cross_OI = torch.ones(num_out, num_in, dtype=torch.float64)
            target = Target(cross_OI, 0.5, torch.ones(num_out, dtype=torch.float64))
        mean_I = torch.full((num_in,), 0.01, dtype=torch.float64) if has_bias else None
        prepare(torch.ones(num_out, num_in), hessian_II, target=target, mean_I=mean_I)
    # Without the caller's weight, and with panels of a product, which are small.
    allocated = peak_bytes(profiler) - 4 * num_out * num_in
    assert allocated == pytest.approx(
        solver_bytes(num_out, num_in, 0, corrects, has_bias), rel=0.06
    )
