"""Run a model in its own process."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from slimgpt.benchmarking.engines.base import Engine, Subject, Timing
from slimgpt.benchmarking.engines.registry import ENGINES
from slimgpt.benchmarking.results import Cost
from slimgpt.config import BenchConfig
from slimgpt.errors import EngineError

log = logging.getLogger(__name__)

_loaded: dict[str, Engine] = {}  # in the worker's process


def load(model: str, config: BenchConfig) -> None:
    """Load a model into this process."""
    _loaded[model] = ENGINES[config.engine](model, config)


def call(model: str, method: str, *arguments: Any) -> Any:
    """Call a method of the model's engine."""
    return getattr(_loaded[model], method)(*arguments)


def unload(model: str) -> None:
    """Close a model, if it is loaded."""
    if engine := _loaded.pop(model, None):
        engine.close()


class Worker:
    """A model in another process."""

    def __init__(self, subject: Subject, config: BenchConfig, pool: ProcessPoolExecutor) -> None:
        self._subject = subject
        self._config = config
        self._pool = pool

    @classmethod
    @contextmanager
    def loaded(cls, subject: Subject, config: BenchConfig) -> Iterator["Worker"]:
        """Load a model into a new process; the engine's output there goes to stderr."""
        context = get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=os.dup2, initargs=(2, 1)) as pool:
            worker = cls(subject, config, pool)
            log.info("loading %s", subject.cost.name)
            try:
                worker._run(load, config)
                yield worker
            finally:
                with suppress(EngineError):  # if the process has already ended
                    worker._run(unload)

    def generate(self, prompts: list[list[int]]) -> Timing:
        """Generate the number of tokens given in the options."""
        return self._run(call, "generate", prompts, self._config.new_tokens)

    def cost(self) -> Cost:
        """Cost of the model, with the peak memory so far."""
        peak = None
        with suppress(EngineError):  # if the process has ended after the measurement
            peak = self._run(call, "peak_memory")
        return replace(self._subject.cost, peak_memory_bytes=peak)

    def _run(self, function: Any, *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, self._subject.location, *arguments).result()
        except BrokenProcessPool as err:
            raise EngineError(
                f"the process that ran {self._subject.cost.name} in {self._config.engine} ended",
                hint="if memory was short, use a smaller --batch-size or --prompt-length; a script "
                'must call slimgpt.bench under `if __name__ == "__main__":`',
            ) from err
