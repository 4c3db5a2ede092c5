"""llama.cpp's server, through xllamacpp."""

import json
import logging
import secrets
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from slimgpt.benchmarking.engines.base import Engine, Subject, Timing, total_size
from slimgpt.benchmarking.results import Cost
from slimgpt.config import BenchConfig
from slimgpt.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from slimgpt.models.source import Source

log = logging.getLogger(__name__)

_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class LlamaCpp(Engine):
    """llama.cpp's server in this process, reached over the loopback interface.

    The server requires a random key, so that other users of the machine cannot use it.
    """

    packages = ("gguf", "xllamacpp")

    @classmethod
    def runs_as_it_is(cls, source: "Source") -> bool:
        """Whether the model is a GGUF file."""
        return source.name.endswith(".gguf")

    @classmethod
    def prepare(cls, source: "Source", config: BenchConfig, scratch: Path) -> Subject:
        """Convert the model, unless it is a GGUF file."""
        from gguf import GGUFReader, Keys

        from slimgpt.exporting.gguf import write_gguf
        from slimgpt.models.loading import LOAD_ERRORS, cannot_load
        from slimgpt.models.weights import weight_files

        if cls.runs_as_it_is(source):
            (file,) = weight_files(source)
        elif config.dtype not in _TYPES:
            raise ConfigError(
                f"the models are stored in {config.dtype}, in which llama.cpp does not run them",
                hint="choose another one, for example --dtype float32",
            )
        else:
            log.info("converting %s", source.name)
            file = scratch.with_suffix(".gguf")
            write_gguf(source, file, _TYPES[config.dtype])
        try:
            reader = GGUFReader(file)
            arch = reader.fields[Keys.General.ARCHITECTURE].contents()
            context = reader.fields[Keys.LLM.CONTEXT_LENGTH.format(arch=arch)].contents()
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            embedding = tensors["token_embd.weight"]
        except LOAD_ERRORS as err:
            raise cannot_load(source.name, err) from err
        blocks = [tensor for name, tensor in tensors.items() if name.startswith("blk.")]
        block_bytes = sum(int(tensor.n_bytes) for tensor in blocks)
        cost = Cost(
            name=source.name,
            dtype=", ".join(sorted({t.tensor_type.name for t in blocks if len(t.shape) > 1})),
            disk_bytes=total_size([file]),
            step_bytes=block_bytes + int(tensors.get("output.weight", embedding).n_bytes),
            block_bytes=block_bytes,
            peak_memory_bytes=None,
        )
        return Subject(cost, str(file), int(embedding.shape[1]), context)

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
        """Generate; the server reports the times."""
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
