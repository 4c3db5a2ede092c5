"""Run benchmark tasks of lm-eval on a live model, with data from the hub or from local files.

Prompts, metrics and standard errors are lm-eval's own; local files only replace the data set in a
task's config.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.config import did_you_mean
from slimgpt.errors import ConfigError, DataError, MissingDependencyError
from slimgpt.evaluation.local_tasks import (
    FIELDS_HINT,
    SPLIT_KEYS,
    check_answers,
    find_files,
    local_dataset,
    tested_split,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suite:
    """Tasks that are reported with their mean.

    Attributes
    ----------
    metrics : dict
        Metric of each task or group of tasks, by lm-eval's names. Each group gets its own mean.
    num_fewshot : int
        Number of few-shot examples.
    weight_by_size : bool
        Whether a mean is over documents rather than over tasks.
    """

    metrics: dict[str, str]
    num_fewshot: int
    weight_by_size: bool = False


SUITES = {
    # acc_norm (per byte of the answer) for every task for which lm-eval defines it.
    "commonsense": Suite(
        {
            "boolq": "acc",
            "piqa": "acc_norm",
            "hellaswag": "acc_norm",
            "winogrande": "acc",
            "arc_easy": "acc_norm",
            "arc_challenge": "acc_norm",
            "openbookqa": "acc_norm",
        },
        num_fewshot=0,
    ),
    "mmlu": Suite(
        {f"mmlu_{part}": "acc" for part in ("humanities", "social_sciences", "stem", "other")},
        num_fewshot=5,
        weight_by_size=True,
    ),
    "longbench": Suite(
        {f"longbench_{part}": "score" for part in ("single", "multi", "summarization", "fewshot")},
        num_fewshot=0,
    ),
}


@dataclass(frozen=True)
class Score:
    """One metric of one task, or a mean over tasks.

    Attributes
    ----------
    task, metric : str
        lm-eval's names, with a filter other than ``none`` after a comma; or the name of a mean.
    value, stderr : float, float or None
        The metric and its standard error.
    higher_is_better : bool
        Whether a higher value is better.
    num_docs : int
        Number of questions.
    num_fewshot : int
        Number of few-shot examples.
    data : str
        Data set or file, and split; for a mean, the number of tasks.
    lm_eval : str
        Versions of lm-eval and of the task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    num_docs: int
    num_fewshot: int
    data: str
    lm_eval: str


@dataclass(frozen=True)
class TaskSet:
    """Loaded tasks with their data, from `load_tasks`. They can run on any model.

    Attributes
    ----------
    tasks : dict
        lm-eval's task objects, by name.
    data : dict
        Source of each task's data.
    means : dict
        The means to report, as suites of single tasks; some of these tasks may lack data.
    """

    tasks: dict[str, Any]
    data: dict[str, str]
    means: dict[str, Suite]


class _Chosen(NamedTuple):
    """The chosen tasks: lm-eval's configs and local files by task name, and the means to report."""

    configs: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Path]]
    means: dict[str, Suite]


def check_tasks(
    names: Sequence[str], data_dir: Path | None = None, num_fewshot: int | None = None
) -> None:
    """Make the checks of `load_tasks` that need no data; raises the same errors."""
    _choose(names, data_dir, num_fewshot)


def load_tasks(
    names: Sequence[str], data_dir: Path | None = None, num_fewshot: int | None = None
) -> TaskSet:
    """Load tasks and their data.

    Parameters
    ----------
    names : sequence of str
        Keys of `SUITES`, or tasks, groups and tags of lm-eval.
    data_dir : Path, optional
        Folder with the data (see `find_split`); by default the data comes from the hub. Tasks of a
        suite or group without a file there are skipped with a warning.
    num_fewshot : int, optional
        Number of few-shot examples; by default the suite's or the task's number.

    Raises
    ------
    MissingDependencyError
        If lm-eval, or a package that a task needs, is not installed.
    ConfigError
        If lm-eval has no such task, the folder does not exist, or a task runs code from the hub or
        code written by the model.
    DataError
        If the data of a task cannot be loaded, or a local file has a question without an answer.
    """
    configs, files, means = _choose(names, data_dir, num_fewshot)
    tasks, data = {}, {}
    for task, config in configs.items():
        local = files.get(task, {})
        tasks[task] = _load_task(task, config, local)
        split = tested_split(config)
        data[task] = local[split].name if local else f"{config.get('dataset_path')}, {split}"
    return TaskSet(tasks, data, means)


def run_tasks(
    found: TaskSet,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    batch_size: int = 8,
) -> Iterator[list[Score]]:
    """Run tasks on a model, one at a time.

    Parameters
    ----------
    found : TaskSet
        From `load_tasks`.
    model, tokenizer
        A causal language model, dense or pruned, and its tokenizer.
    limit : int, optional
        Number of documents per task, from the first; by default all.
    batch_size : int
        Requests in one forward pass; affects only the speed.

    Yields
    ------
    list of Score
        The metrics of a task, and each mean whose tasks are all done.
    """
    from lm_eval.models import huggingface

    make_lm: Any = huggingface.HFLM  # its decorators hide its signature
    lm = make_lm(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
    before: list[Score] = []
    for number, name in enumerate(found.tasks, 1):
        log.info("task %d/%d: %s", number, len(found.tasks), name)
        scores = _run_task(found, name, lm, limit)
        before += scores
        complete = [
            _average(mean_name, mean, before)
            for mean_name, mean in found.means.items()
            if [task for task in found.tasks if task in mean.metrics][-1:] == [name]
        ]
        yield [*scores, *(mean for mean in complete if mean)]


def _run_task(found: TaskSet, name: str, lm: Any, limit: int | None) -> list[Score]:
    from lm_eval import evaluator

    simple_evaluate: Any = evaluator.simple_evaluate
    # lm-eval would look up the git commit of the current folder.
    no_commit = _replaced(evaluator, "get_git_commit_hash", lambda: None)
    with _no_code_from_the_hub(), no_commit, _counting_truncations() as truncations:
        results = simple_evaluate(
            lm,
            tasks=[found.tasks[name]],
            task_manager=_manager(),
            limit=limit,
            log_samples=False,
        )
    if truncations:
        log.warning(
            "%s: at least %d prompts did not fit into the model's %d tokens and lost their "
            "beginning, solved examples first",
            name,
            len(truncations),
            lm.max_length,
        )
    values = results["results"][name]
    wanted = {mean.metrics[name] for mean in found.means.values() if name in mean.metrics}
    scores = []
    for key, value in values.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or (wanted and metric not in wanted):
            continue
        stderr = values[f"{metric}_stderr,{filter_}"]
        scores.append(
            Score(
                task=name,
                metric=metric if filter_ == "none" else key,
                value=float(value),
                stderr=None if stderr == "N/A" else float(stderr),
                higher_is_better=results["higher_is_better"][name].get(metric, True),
                num_docs=values["sample_len"],
                num_fewshot=results["n-shot"][name],
                data=found.data[name],
                lm_eval=f"{version('lm-eval')}, task version {results['versions'][name]}",
            )
        )
    return scores


@cache
def _manager() -> Any:
    """The index of lm-eval's tasks, cached because building it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module inside the context."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _no_code_from_the_hub() -> AbstractContextManager[None]:
    """Refuse metrics that the package evaluate would download and run as scripts."""
    import evaluate

    def refuse(path: str, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            f"the metric {path!r} is code from the hub, which is not run",
            hint="leave out the task that needs it",
        )

    return _replaced(evaluate, "load", refuse)


@contextmanager
def _counting_truncations() -> Iterator[list[str]]:
    """Collect lm-eval's messages about prompts longer than the context."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "truncat" in record.getMessage().lower():
                messages.append(record.getMessage())

    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level, logger.propagate
    collector = Collector()
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.level, logger.propagate = before


def _choose(names: Sequence[str], data_dir: Path | None, num_fewshot: int | None) -> _Chosen:
    if find_spec("lm_eval") is None:
        raise MissingDependencyError("lm-eval", "--tasks", "pip install 'slimgpt[eval]'")
    if data_dir and not data_dir.is_dir():
        raise ConfigError(
            f"the data directory {data_dir} does not exist", hint="correct --data-dir"
        )
    means: dict[str, Suite] = {}
    shots: dict[str, int | None] = {}
    for name in names:
        suite = SUITES.get(name)
        if suite:
            means |= _means(name, suite)
            shots |= dict.fromkeys(means[name].metrics, suite.num_fewshot)
        else:
            for task in _expand(name):
                shots.setdefault(task, None)
    if num_fewshot is not None:
        shots = dict.fromkeys(shots, num_fewshot)
    configs = {
        task: (_manager().task_index[task].cfg or {})
        | ({} if number is None else {"num_fewshot": number})
        for task, number in shots.items()
    }
    files: dict[str, dict[str, Path]] = {}
    if data_dir:
        files = find_files(configs, data_dir, required=set(names))
        configs = {task: configs[task] for task in files}
    return _Chosen(configs, files, means)


def _expand(name: str) -> list[str]:
    """Expand a task, group or tag of lm-eval to single tasks."""
    manager = _manager()
    if name not in manager.task_index:
        raise ConfigError(
            f"lm-eval has no task {name!r}",
            hint=f"{did_you_mean(name, list(SUITES))}, or any task that `lm-eval ls tasks` lists",
        )
    entry = manager.task_index[name]
    if name in manager.all_groups:
        members = entry.cfg["task"]
        if not all(isinstance(member, str) for member in members):
            raise ConfigError(
                f"the group {name!r} changes the tasks in it", hint="name its tasks one by one"
            )
    elif name in manager.all_tags:
        members = sorted(entry.tags)
    else:
        return [name]
    return [task for member in members for task in _expand(member)]


def _means(name: str, suite: Suite) -> dict[str, Suite]:
    """The means of a suite over single tasks: one for each group, and one for all tasks."""
    means, all_metrics = {}, {}
    for member, metric in suite.metrics.items():
        metrics = dict.fromkeys(_expand(member), metric)
        all_metrics |= metrics
        if list(metrics) != [member]:
            means[member] = replace(suite, metrics=metrics)
    return means | {name: replace(suite, metrics=all_metrics)}


def _average(name: str, mean: Suite, scores: list[Score]) -> Score | None:
    from lm_eval.api import metrics

    members = [score for score in scores if mean.metrics.get(score.task) == score.metric]
    if not members:
        return None
    values = [score.value for score in members]
    sizes = [score.num_docs for score in members]
    stderrs = [score.stderr for score in members if score.stderr is not None]
    stderr = None
    if len(stderrs) == len(members):
        stderr = float(
            metrics.pooled_sample_stderr(stderrs, sizes)
            if mean.weight_by_size
            else metrics.unweighted_mean_stderr(stderrs)
        )
    return Score(
        task=name,
        metric="mean",
        value=metrics.aggregate_subtask_metrics(values, sizes, mean.weight_by_size),
        stderr=stderr,
        higher_is_better=members[0].higher_is_better,
        num_docs=sum(sizes),
        num_fewshot=members[0].num_fewshot,
        data=f"{len(members)} of {len(mean.metrics)} tasks",
        lm_eval=members[0].lm_eval.rpartition(",")[0],
    )


def _load_task(task: str, config: dict[str, Any], files: dict[str, Path]) -> Any:
    if config.get("unsafe_code"):
        raise ConfigError(
            f"the task {task!r} runs what the model writes, which is not done",
            hint="run it with lm-eval itself, in a sandbox",
        )
    changes = {"num_fewshot": config["num_fewshot"]} if "num_fewshot" in config else {}
    try:
        if files:
            dataset = local_dataset(files, config["dataset_path"])
            splits = {key: config.get(key) for key in SPLIT_KEYS}
            changes |= {key: split if split in files else None for key, split in splits.items()}
            changes["custom_dataset"] = lambda **_: dataset
        with _no_code_from_the_hub():
            found = _manager().load([{"group": task, "task": [{"task": task, **changes}]}])
        loaded = found["tasks"][task]
        if files:
            check_answers(loaded, files[tested_split(config)])
        return loaded
    except (ConfigError, DataError):
        raise
    except ImportError as err:  # lm-eval names its extras after tasks
        package = f"lm-eval[{task.partition('_')[0]}]"
        raise MissingDependencyError(
            package, f"the task {task!r}", f"pip install '{package}'"
        ) from err
    except Exception as err:  # downloads and loading scripts raise errors of any type
        source = ", ".join(map(str, files.values())) or f"the hub ({config.get('dataset_path')})"
        raise DataError(
            f"cannot load the task {task} from {source}: {' '.join(str(err).split())[:200]}",
            hint=FIELDS_HINT,
        ) from err
