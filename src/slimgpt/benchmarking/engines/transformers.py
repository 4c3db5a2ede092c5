"""The engine ``transformers``, which runs the model's ``generate``."""

import time
from typing import Any

from slimgpt.benchmarking.engines.base import Engine, Timing
from slimgpt.config import BenchConfig


class Transformers(Engine):
    """A model of transformers."""

    @classmethod
    def resolve(cls, config: BenchConfig) -> BenchConfig:
        """Find the device."""
        from slimgpt.models.device import find_device

        device = str(find_device(config.device))
        return super().resolve(config).model_copy(update={"device": device})

    def __init__(self, model: str, config: BenchConfig) -> None:
        import torch
        from transformers import GenerationConfig

        from slimgpt.models.loading import load_model
        from slimgpt.models.source import find_model

        if config.threads:
            torch.set_num_threads(config.threads)
        self._model: Any = load_model(find_model(model), config.dtype, config.device)
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """Generate; a streamer records the time of each step."""
        import torch

        clock = _Clock()
        ids = torch.tensor(prompts, device=self._model.device)
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, streamer=clock
        )
        start, first, last = clock.times[0], clock.times[1], clock.times[-1]
        return Timing(first - start, last - first)

    def peak_memory(self) -> int | None:
        """Peak memory of the process, or of the GPU."""
        import torch

        if self._model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._model.device)
        return super().peak_memory()


class _Clock:
    """A streamer that records the times of the prompt and of each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
