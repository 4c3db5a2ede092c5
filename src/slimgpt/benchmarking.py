"""How fast a model runs in an engine, next to its base: what pruning has bought.

Each model is loaded into a process of its own. The two take turns round by round, so that a busy
machine slows both, and every ratio is that of two neighbouring measurements.
"""

import logging
import random
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from slimgpt import engines
from slimgpt.config import BenchConfig
from slimgpt.engines import Timing
from slimgpt.errors import ConfigError, EngineError, MissingDependencyError
from slimgpt.families import blocks_of
from slimgpt.model import Source, build_skeleton, find_model, load_config
from slimgpt.run import replacing, writing
from slimgpt.weights import weight_files

log = logging.getLogger(__name__)

_PACKAGES = {"transformers": (), "llamacpp": ("gguf", "xllamacpp"), "vllm": ("vllm",)}
_GGUF_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Spread:
    """A quantity over the rounds.

    Attributes
    ----------
    median, low, high : float
        The median, the smallest and the largest value.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise the values of the rounds."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """How fast a model is with one batch size and prompt length.

    Attributes
    ----------
    prefill, decode : Spread
        Tokens per second over the whole batch: of the prompts until the first token, and of the
        tokens after the first.
    first_token, token : Spread
        Seconds until the first token, and for each one after it.
    """

    prefill: Spread
    decode: Spread
    first_token: Spread
    token: Spread


@dataclass(frozen=True)
class Setting:
    """The measurements with one batch size and prompt length.

    Attributes
    ----------
    batch_size, prompt_length : int
        Sequences at once, and tokens of each prompt.
    model, base : Speed, Speed or None
        Of the two models.
    prefill_speedup, decode_speedup : Spread or None
        Of the model over the base, from pairs of neighbouring rounds.
    """

    batch_size: int
    prompt_length: int
    model: Speed
    base: Speed | None
    prefill_speedup: Spread | None
    decode_speedup: Spread | None


@dataclass(frozen=True)
class Cost:
    """What a model takes up.

    Attributes
    ----------
    name : str
        As the user named it.
    disk_bytes : int
        Files with weights.
    step_bytes : int
        Weights that each step reads: the blocks and the head. Decoding is bound by these.
    block_bytes : int
        Weights that each prompt token is multiplied with: the blocks.
    peak_memory_bytes : int or None
        Largest memory of the process that ran it.
    """

    name: str
    disk_bytes: int
    step_bytes: int
    block_bytes: int
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class BenchResult:
    """Speeds and costs of a model, and of its base if one was given.

    Attributes
    ----------
    engine : str
        What ran them.
    threads, new_tokens, repeats : int
        CPU threads, tokens generated for each sequence, rounds that count.
    costs : tuple of Cost
        Of the model, then of the base.
    settings : tuple of Setting
        One for each batch size and prompt length.
    ideal_prefill, ideal_decode : float or None
        Speed-ups if time were proportional to the bytes of the weights that take part.
    """

    engine: str
    threads: int
    new_tokens: int
    repeats: int
    costs: tuple[Cost, ...]
    settings: tuple[Setting, ...]
    ideal_prefill: float | None
    ideal_decode: float | None


@dataclass(frozen=True)
class _Contestant:
    """A model ready for the engine: what it loads, and what is known of it."""

    name: str
    location: str
    disk_bytes: int
    head_bytes: int
    block_bytes: int
    vocab_size: int
    context: int


def bench(model: str, **options: Any) -> BenchResult:
    """Measure how fast a model generates, and how much memory it needs.

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

    Raises
    ------
    SlimGPTError
        If an option or a model is wrong, or the engine is not installed or fails.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.bench("slim", against="smollm2-135m", engine="llamacpp")  # doctest: +SKIP
    """
    config = BenchConfig.create(**options)
    _check_environment(config)
    threads = config.threads or torch.get_num_threads()
    config = config.model_copy(update={"threads": threads})
    names = [model, *([config.against] if config.against else [])]
    sources = [find_model(name) for name in names]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        entered = [
            _prepare(source, config, Path(scratch) / f"{index}.gguf")
            for index, source in enumerate(sources)
        ]
        _check_lengths(entered, config)
        workers = [stack.enter_context(_Worker(contestant, config)) for contestant in entered]
        vocab_size = min(contestant.vocab_size for contestant in entered)
        settings = tuple(
            _measure(workers, config, batch_size, prompt_length, vocab_size)
            for batch_size, prompt_length in product(config.batch_size, config.prompt_length)
        )
        costs = tuple(worker.cost() for worker in workers)
    result = BenchResult(
        engine=config.engine,
        threads=threads,
        new_tokens=config.new_tokens,
        repeats=config.repeats,
        costs=costs,
        settings=settings,
        ideal_prefill=costs[1].block_bytes / costs[0].block_bytes if config.against else None,
        ideal_decode=costs[1].step_bytes / costs[0].step_bytes if config.against else None,
    )
    if config.plot:
        _plot(result, Path(config.plot))
    return result


class _Worker:
    """A process with a loaded model."""

    def __init__(self, contestant: _Contestant, config: BenchConfig) -> None:
        self._contestant = contestant
        self._config = config
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> "_Worker":
        log.info("loading %s", self._contestant.name)
        self._run(engines.load, self._config)
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def generate(self, prompts: list[list[int]]) -> Timing:
        return self._run(engines.generate, prompts, self._config.new_tokens)

    def cost(self) -> Cost:
        entered = self._contestant
        return Cost(
            name=entered.name,
            disk_bytes=entered.disk_bytes,
            step_bytes=entered.block_bytes + entered.head_bytes,
            block_bytes=entered.block_bytes,
            peak_memory_bytes=self._run(engines.peak),
        )

    def _run(self, function: Any, *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, self._contestant.location, *arguments).result()
        except BrokenProcessPool as err:
            raise EngineError(
                f"the process that ran {self._contestant.name} in {self._config.engine} ended",
                hint="if memory was short, use a smaller --batch-size or --prompt-length",
            ) from err


def _check_environment(config: BenchConfig) -> None:
    for package in _PACKAGES[config.engine]:
        if find_spec(package) is None:
            command = f"pip install 'slimgpt[{config.engine}]'"
            raise MissingDependencyError(package, f"--engine {config.engine}", command)
    if config.plot and find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", "--plot", "pip install 'slimgpt[report]'")
    if config.plot and not Path(config.plot).parent.is_dir():
        raise ConfigError(f"the directory of --plot {config.plot} does not exist")


def _prepare(source: Source, config: BenchConfig, converted: Path) -> _Contestant:
    if config.engine == "llamacpp":
        return _prepare_gguf(source, config, converted)
    if config.engine == "vllm" and source.gguf_file:
        raise ConfigError(f"{source.name} is a GGUF file, which --engine vllm does not run here")
    model_config = load_config(source)
    skeleton: Any = build_skeleton(model_config)
    size = _dtype(source, config).itemsize
    return _Contestant(
        name=source.name,
        location=source.name,
        disk_bytes=_total_size(weight_files(source)),
        head_bytes=skeleton.get_output_embeddings().weight.numel() * size,
        block_bytes=sum(p.numel() for p in blocks_of(skeleton).parameters()) * size,
        vocab_size=model_config.vocab_size,
        context=model_config.max_position_embeddings,
    )


def _prepare_gguf(source: Source, config: BenchConfig, converted: Path) -> _Contestant:
    """A GGUF file runs as it is, any other model is converted."""
    from gguf import GGUFReader, Keys

    from slimgpt.gguf import write_gguf

    file = converted
    if source.name.endswith(".gguf"):
        (file,) = weight_files(source)
    else:
        log.info("converting %s", source.name)
        kind = _GGUF_TYPES[str(_dtype(source, config)).removeprefix("torch.")]
        write_gguf(source, file, kind)
    reader = GGUFReader(file)
    arch = reader.fields[Keys.General.ARCHITECTURE].contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    embedding = tensors["token_embd.weight"]
    return _Contestant(
        name=source.name,
        location=str(file),
        disk_bytes=_total_size([file]),
        head_bytes=int(tensors.get("output.weight", embedding).n_bytes),
        block_bytes=sum(int(t.n_bytes) for t in reader.tensors if t.name.startswith("blk.")),
        vocab_size=int(embedding.shape[1]),
        context=reader.fields[Keys.LLM.CONTEXT_LENGTH.format(arch=arch)].contents(),
    )


def _dtype(source: Source, config: BenchConfig) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored: Any = None if source.gguf_file else load_config(source).dtype
    return stored or torch.float32


def _total_size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _check_lengths(entered: Sequence[_Contestant], config: BenchConfig) -> None:
    needed = max(config.prompt_length) + config.new_tokens
    for contestant in entered:
        if needed > contestant.context:
            raise ConfigError(
                f"the longest prompt and its new tokens are {needed} tokens, but {contestant.name} "
                f"has a context of {contestant.context}",
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
    for index in range(config.warmup + config.repeats):
        order = range(len(workers))[:: -1 if index % 2 else 1]
        rounds.append({turn: workers[turn].generate(prompts) for turn in order})
    timings = [[timing[turn] for timing in rounds[config.warmup :]] for turn in range(len(workers))]
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


def _plot(result: BenchResult, file: Path) -> None:
    """Bars of the speeds, whiskers from the slowest round to the fastest, ideals as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    labels = [f"{s.batch_size} × {s.prompt_length}" for s in result.settings]
    columns = [("model", result.costs[0].name), *(("base", c.name) for c in result.costs[1:])]
    for axes, (kind, ideal) in zip(
        figure.subplots(1, 2),
        (("prefill", result.ideal_prefill), ("decode", result.ideal_decode)),
        strict=True,
    ):
        for offset, (column, name) in enumerate(columns):
            spreads = [getattr(getattr(s, column), kind) for s in result.settings]
            medians = [s.median for s in spreads]
            whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            places = [
                index + (offset - (len(columns) - 1) / 2) * 0.4 for index in range(len(labels))
            ]
            axes.bar(places, medians, 0.36, yerr=whiskers, capsize=3, label=Path(name).name)
            if column == "base" and ideal:
                targets = [ideal * median for median in medians]
                axes.hlines(
                    targets,
                    [place - 0.58 for place in places],
                    [place - 0.22 for place in places],
                    colors="black",
                    linestyles="dashed",
                    label=f"base × {ideal:.2f}",
                )
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("batch size × prompt length")
        axes.set_ylabel("tokens/s")
        axes.set_title(kind)
        axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
        axes.legend()
    figure.suptitle(f"{result.engine}, {result.threads} threads")
    with writing(file), replacing(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:])
