"""The memory estimate, compared with what is allocated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from torch.profiler import ProfilerActivity, profile

from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError
from slimgpt.models.source import find_model
from slimgpt.pruning.estimate import estimate_memory
from slimgpt.pruning.inputs import open_inputs
from slimgpt.pruning.memory import (
    Activations,
    MemoryEstimate,
    free_gpu_memory,
    place_activations,
    size,
    solver_bytes,
)
from slimgpt.pruning.plan import initial_widths
from slimgpt.runtime.environment import free_within_cgroups
from slimgpt.runtime.progress import no_progress
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


def test_activations_share_the_budget() -> None:
    assert place_activations(30, 50, 100) == Activations(50)
    assert place_activations(30, 90, 100) == Activations(70)
    assert place_activations(130, 90, 100) == Activations(90, is_mapped=True)


def test_activations_are_on_the_gpu_where_there_is_room() -> None:
    assert place_activations(30, 50, 100, gpu_room=200) == Activations(50, on_gpu=True)
    # Beyond the budget they may take half of the room.
    assert place_activations(130, 90, 100, gpu_room=400) == Activations(70, on_gpu=True)
    assert place_activations(130, 90, 100, gpu_room=200) == Activations(90, is_mapped=True)
    # The budget may be more than the room.
    assert place_activations(30, 90, 100, gpu_room=60) == Activations(30, on_gpu=True)
    assert place_activations(70, 90, 100, gpu_room=60) == Activations(30)
    assert place_activations(70, 90, 100, gpu_room=-5) == Activations(0)


def estimate(model: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> MemoryEstimate:
    """Of a run on a GPU with so many free bytes of 80 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    config = PruneConfig.create(ratio=0.3, calibration=TEXT, nsamples=12, seqlen=32)
    device = torch.device("cuda", 0)
    inputs = open_inputs(find_model(str(model)), config, device, no_progress)
    widths = initial_widths(inputs.shapes, inputs.base_config, config, None)
    return estimate_memory(inputs, widths)


def test_a_block_that_does_not_fit_the_gpu_is_refused_with_numbers(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint("llama")
    roomy = estimate(model, monkeypatch, 2**30)
    roomy.check(tmp_path, 0)
    assert roomy.activations.on_gpu
    assert roomy.gpu_memory == roomy.working + roomy.activations.kept + roomy.stream
    assert roomy.memory == roomy.beside
    assert f"{size(roomy.gpu_memory)} of GPU memory" in str(roomy)
    assert "are in GPU memory" in str(roomy)
    # The activations do not make a run fail.
    tight = estimate(model, monkeypatch, roomy.working + 1)
    tight.check(tmp_path, 0)
    assert not tight.activations.on_gpu
    small = estimate(model, monkeypatch, 2**15)
    pattern = (
        rf"about {size(small.working)} of GPU memory.* 32.0 KiB of 80.0 GiB are free on cuda:0"
    )
    with pytest.raises(ConfigError, match=pattern):
        small.check(tmp_path, 0)


def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_busy(device: torch.device) -> None:
        raise RuntimeError("CUDA error: device is busy or unavailable\nCompile with …")

    monkeypatch.setattr(torch.cuda, "mem_get_info", is_busy)
    with pytest.raises(ConfigError, match=r"GPU cuda:0 cannot be used: .* or unavailable$"):
        free_gpu_memory(torch.device("cuda", 0))


def test_the_estimate_of_the_cpu_has_no_gpu_memory() -> None:
    placed = Activations(3)
    found = MemoryEstimate(5, placed, 7, 11, device=torch.device("cpu"), beside=13)
    assert (found.gpu_memory, found.memory) == (0, 15)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def write_cgroup(directory: Path, names: tuple[str, str, str], limit: str, used: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[2]} 100\n")


@pytest.mark.parametrize(
    ("line", "names", "top"),
    [("0::/jobs/mine", V2, ""), ("4:cpu,memory:/jobs/mine", V1, "memory")],
    ids=["version 2", "version 1"],
)
def test_limits_of_cgroups(
    line: str, names: tuple[str, str, str], top: str, tmp_path: Path
) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text(f"2:cpuset:/other\n{line}\n")
    assert free_within_cgroups(root, membership) == []
    write_cgroup(root / top / "jobs" / "mine", names, "1000", 700)
    write_cgroup(root / top / "jobs", names, "5000", 4900)
    assert free_within_cgroups(root, membership) == [400, 200]
    write_cgroup(root / top / "jobs", names, "max" if names is V2 else str(2**63), 4900)
    assert min(free_within_cgroups(root, membership)) == 400


def test_no_cgroups(tmp_path: Path) -> None:
    assert free_within_cgroups(tmp_path, tmp_path / "missing") == []
