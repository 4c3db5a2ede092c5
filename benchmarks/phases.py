"""Time the phases of a run."""

import pkgutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

PHASES = {
    "sample": ["pruning.inputs.sample_from_model"],
    "sensitivity": ["pruning.prune.allocate"],
    "read": ["models.weights.Weights.read"],
    "forward": [
        "calibration.activations.run_sublayer",
        "pruning.block.propagate",
        "pruning.block.pass_through",
    ],
    "gram": ["pruning.block.collect"],
    "solve": ["methods.slimgpt.SlimGPT.decide"],
    "refit": ["pruning.block.refit"],
    "write": [
        "pruning.sequential.write_file",
        "checkpoint.writer.write_file",
        "runtime.files.sync",
        "runtime.run_directory.sync",
    ],
}


def now() -> float:
    """Seconds of a clock, when the GPU has done what it was asked to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds spent in each phase. The time of a nested phase counts only for that phase.

    Exception: everything inside a sensitivity pass counts for the sensitivity pass. What another
    thread does meanwhile does not count.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._in_sensitivity = False

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time counts for a phase."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            is_other_thread = threading.current_thread() is not threading.main_thread()
            if self._in_sensitivity or is_other_thread:
                return function(*args, **kwargs)
            self._in_sensitivity = phase == "sensitivity"
            self._inner.append(0.0)
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._in_sensitivity = False
                whole = now() - start
                own = whole - self._inner.pop()
                self._inner[-1] += whole
                self.seconds[phase] = self.seconds.get(phase, 0.0) + own

        return wrapper


@contextmanager
def timed_phases() -> Iterator[Clock]:
    """Count the phases of every run of `slimgpt.prune` inside the block."""
    clock = Clock()
    with ExitStack() as stack:
        for phase, names in PHASES.items():
            for name in names:
                function = pkgutil.resolve_name(f"slimgpt.{name}")
                timed = clock.timed(phase, function)
                stack.enter_context(mock.patch(f"slimgpt.{name}", timed))
        yield clock
