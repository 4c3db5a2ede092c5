"""Inference engines behind one interface: load a model, generate, say when the tokens came.

These functions run in a process of their own for each model, so that its peak memory is the
model's. Only what the engine itself needs is imported there.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from slimgpt.config import BenchConfig
from slimgpt.errors import EngineError
from slimgpt.runtime.environment import peak_memory


@dataclass(frozen=True)
class Timing:
    """When the tokens of a batch came.

    Attributes
    ----------
    first : float
        Seconds until every sequence had its first token.
    rest : float
        Seconds from then on until every sequence had its last.
    """

    first: float
    rest: float


class Engine(Protocol):
    """A loaded model."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """Generate for all prompts at once, greedily and without regard to end-of-text tokens."""
        ...

    def peak_memory(self) -> int | None:
        """Bytes of the device's memory that were used at most; None where unknown."""
        ...


class Transformers:
    """``generate`` of transformers."""

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
        """Generate; a streamer hears of each step after it is done."""
        import torch

        clock = _Clock()
        ids = torch.tensor(prompts, device=self._model.device)
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, streamer=clock
        )
        start, first, last = clock.times[0], clock.times[1], clock.times[-1]
        return Timing(first - start, last - first)

    def peak_memory(self) -> int | None:
        """Of the process, or of the GPU."""
        import torch

        if self._model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._model.device)
        return peak_memory()


class _Clock:
    """A streamer that notes when it is given the prompt, and then each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class LlamaCpp:
    """The server of llama.cpp, in this process, over its loopback interface.

    It answers only who has its key, which is new each time: other users of the machine have not.
    """

    def __init__(self, model: str, config: BenchConfig) -> None:
        xllamacpp: Any = import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_parallel = max(config.batch_size)
        longest = max(config.prompt_length)
        params.n_ctx = params.n_parallel * (longest + config.new_tokens)
        params.n_batch = params.n_parallel * longest  # all prompts in one step
        params.cache_ram_mib = 0
        self._key = secrets.token_hex(16)
        params.api_keys = [self._key]
        params.verbosity = -1
        if config.threads:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = config.threads
        if config.device == "cpu":
            params.n_gpu_layers = 0
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as err:
            raise EngineError(
                f"llama.cpp cannot load {model}: {err}",
                hint="write the file again with slimgpt export, or use --engine transformers",
            ) from err

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Timing:
        """Generate; the server itself says how long it took."""
        body = {
            "prompt": prompts,
            "n_predict": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        url = f"{self._server.listening_address}/completion"
        headers = {"Authorization": f"Bearer {self._key}"}
        request = Request(url, json.dumps(body).encode(), headers)
        try:
            with build_opener(ProxyHandler({})).open(request) as response:
                answer = json.load(response)
        except HTTPError as err:
            raise EngineError(
                f"llama.cpp does not run the prompts: {err.read().decode(errors='replace')}",
                hint="use a smaller --batch-size, --prompt-length or --new-tokens",
            ) from err
        timings = [a["timings"] for a in (answer if isinstance(answer, list) else [answer])]
        first, rest = (max(t[f"{k}_ms"] for t in timings) / 1000 for k in ("prompt", "predicted"))
        return Timing(first, rest)

    def peak_memory(self) -> int | None:
        """Of the process."""
        return peak_memory()


class Vllm:
    """The offline interface of vLLM."""

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
        """Generate one token, and then all of them: the difference is the rest."""
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

    def shut_down(self) -> None:
        """End vLLM's own processes: this one would wait for them for ever."""
        self._llm.llm_engine.engine_core.shutdown()

    def peak_memory(self) -> int | None:
        """Not known: it lies in processes of vLLM, which fills what it is given with its cache."""
        return None


ENGINES: dict[str, Callable[[str, BenchConfig], Engine]] = {
    "transformers": Transformers,
    "llamacpp": LlamaCpp,
    "vllm": Vllm,
}

_loaded: dict[str, Engine] = {}


def load(model: str, config: BenchConfig) -> None:
    """Load a model into this process."""
    _loaded[model] = ENGINES[config.engine](model, config)


def generate(model: str, prompts: list[list[int]], num_tokens: int) -> Timing:
    """Generate with a model that is loaded."""
    return _loaded[model].generate(prompts, num_tokens)


def peak(model: str) -> int | None:
    """Largest memory that a loaded model has needed so far, in bytes."""
    return _loaded[model].peak_memory()


def unload(model: str) -> None:
    """Let go of a model, if it has been loaded."""
    engine = _loaded.pop(model, None)
    if isinstance(engine, Vllm):
        engine.shut_down()
