"""The engine ``vllm``, through vLLM's offline interface."""

import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimgpt.benchmarking.engines.base import Engine, Subject, Timing
from slimgpt.config import BenchConfig
from slimgpt.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from slimgpt.models.source import Source


class Vllm(Engine):
    """A model in vLLM, which starts its own processes."""

    packages = ("vllm",)

    @classmethod
    def resolve(cls, config: BenchConfig) -> BenchConfig:
        """Refuse options that vLLM chooses itself."""
        if config.threads or config.device != "auto":
            raise ConfigError(
                "--engine vllm takes no --threads and no --device: it chooses itself",
                hint="leave them out",
            )
        return config

    @classmethod
    def prepare(cls, source: "Source", config: BenchConfig, scratch: Path) -> Subject:
        """Refuse GGUF files."""
        if source.gguf_file:
            raise ConfigError(
                f"{source.name} is a GGUF file, which --engine vllm does not run here",
                hint="name the checkpoint that it was made from, or use --engine llamacpp",
            )
        return super().prepare(source, config, scratch)

    def __init__(self, model: str, config: BenchConfig) -> None:
        vllm: Any = import_module("vllm")
        self._sampling = vllm.SamplingParams
        try:
            self._llm = vllm.LLM(
                model,
                dtype=config.dtype,
                max_num_seqs=max(config.batch_size),
                max_model_len=max(config.prompt_length) + config.new_tokens,
                enable_prefix_caching=False,
            )
        except (OSError, RuntimeError, ValueError) as err:
            raise EngineError(
                f"vLLM cannot load {model}: {err}",
                hint="docs/serving.md says what vLLM needs; --engine transformers needs nothing",
            ) from err

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """Time the generation of one token, then of all; `rest` is the difference."""
        first, whole = (self._seconds(prompts, count) for count in (1, num_tokens))
        if whole <= first:
            raise EngineError(
                f"vLLM took {first:.4f} s for one token and {whole:.4f} s for {num_tokens}, "
                "too few to tell them apart",
                hint="use more --new-tokens",
            )
        return Timing(first, whole - first)

    def _seconds(self, prompts: list[list[int]], num_tokens: int) -> float:
        sampling = self._sampling(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        start = time.perf_counter()
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._llm.generate(inputs, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def peak_memory(self) -> int | None:
        """Unknown: vLLM's own processes hold the model, and its cache fills their memory."""
        return None

    def close(self) -> None:
        """Stop vLLM's own processes; otherwise this process would wait for them forever."""
        self._llm.llm_engine.engine_core.shutdown()
