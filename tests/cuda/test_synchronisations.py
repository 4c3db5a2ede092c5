"""How often the host waits for the device, counted on the CPU by the operations that would wait.

`waits` counts what reads a tensor's values on the host: scalars, `tolist`, `numpy`, `nonzero` and
Boolean masks (whose result has a size that depends on values), and the check of a factorisation.
On a GPU each takes about 20 µs, and ends what was queued.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_tiny_model, sample_tokens
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimgpt.calibration.activations import embed
from slimgpt.config import PruneConfig
from slimgpt.models.blocks import bind
from slimgpt.models.units import Kept
from slimgpt.pruning import refit as refitting
from slimgpt.pruning.slicing import slice_sublayer
from slimgpt.solver import elimination
from slimgpt.solver.hessian import Problem, prepare

OPERATIONS = ("_local_scalar_dense", "nonzero", "_linalg_check_errors", "masked_select")
METHODS = ("tolist", "numpy", "__array__")


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(arg, Tensor) and arg.dtype == torch.bool for arg in tree_leaves(args[1])
        )
        if masks or name in OPERATIONS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count what would wait for the device inside the block."""
    seen: Counter[str] = Counter()
    with _Methods(seen), _Operations(seen):
        yield seen


@pytest.mark.parametrize(
    "read",
    [float, Tensor.tolist, Tensor.numpy, torch.nonzero, lambda x: x[x > 0], bool],
    ids=["float", "tolist", "numpy", "nonzero", "mask", "bool"],
)
def test_what_waits_is_counted(read: Callable[[Tensor], Any]) -> None:
    with waits() as seen:
        read(torch.ones(1) + torch.ones(1))
    assert seen.total() == 1


@pytest.fixture(scope="module")
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    inputs_TI = torch.randn(1024, 256, generator=generator)
    weight_OI = torch.randn(32, 256, generator=generator)
    return prepare(weight_OI, inputs_TI.T @ inputs_TI / 1024)


@pytest.mark.parametrize("panel_size", [8, 32])
def test_two_waits_per_panel_of_channels(
    panel_size: int, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels = []
    choose = elimination._eliminate_one_by_one

    def counted(*args: Any) -> Any:
        panels.append(args)
        return choose(*args)

    monkeypatch.setattr(elimination, "_eliminate_one_by_one", counted)
    with waits() as seen:
        elimination.eliminate_channels(problem, 128, panel_size)
    assert len(panels) >= 128 // panel_size
    # The choice of the pivots, how many of them are valid; at the end the error.
    assert seen == {"numpy": len(panels), "_local_scalar_dense": len(panels) + 1}


@pytest.mark.parametrize(
    "eliminate",
    [
        lambda problem: elimination.eliminate_channel_groups(problem, 128, 8, 16),
        lambda problem: elimination.eliminate_units(problem, 8, 16),
        lambda problem: elimination.eliminate_units(problem, 8, 16, "diagonal", 4),
    ],
    ids=["channel groups", "units", "further units"],
)
def test_one_wait_in_all(eliminate: Callable[[Problem], Any], problem: Problem) -> None:
    with waits() as seen:
        eliminate(problem)
    assert seen == {"_local_scalar_dense": 1}


def test_a_step_of_the_refit_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for num_samples in (16, 32):
        model = make_tiny_model("llama")
        stream = embed(model, sample_tokens(num_samples, 64), 8)
        ffn = next(iter(bind(model))).sublayers[1]
        dense = replace(ffn, module=copy.deepcopy(ffn.module))
        kept = torch.arange(48)
        slice_sublayer(ffn, Kept(kept), ffn.output.weight[:, kept])
        monkeypatch.setattr(refitting, "STEP_TOKENS", 128)
        with waits() as seen:
            refitting.refit(ffn, dense, stream, PruneConfig.create(correction=0.0))
        counts.append(seen)
    few, many = counts
    # Eight steps more, and as many for each error. How many of a step's tokens a process has is
    # known in host memory, where this is read. Nothing else is.
    assert many - few == {"_local_scalar_dense": 3 * 8}
