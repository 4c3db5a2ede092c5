"""Run a recipe: run the steps of each cell of its grid, and write the table or figure.

The name of a step's result contains a hash of everything that determines it. Steps shared by cells
therefore run once, finished steps do not run again, and a changed recipe runs only changed steps.
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch.distributed import is_torchelastic_launched

from slimgpt.benchmarking.bench import bench
from slimgpt.benchmarking.results import BenchResult
from slimgpt.checkpoint.results import (
    RECOVERY_FILE,
    REPORT_FILE,
    PruningReport,
    RecoveryReport,
    read_report,
    read_typed,
)
from slimgpt.config import EvalConfig, PruneConfig, RecoverConfig
from slimgpt.data.datasets import check_dataset, describe_dataset
from slimgpt.errors import (
    ConfigError,
    DamagedRunError,
    MissingDependencyError,
    OtherRunError,
    RunStateError,
    SlimGPTError,
    is_disk_full,
    resource_error,
)
from slimgpt.evaluation.evaluate import Evaluation, evaluate
from slimgpt.evaluation.tasks import check_tasks
from slimgpt.experiments.recipe import (
    VERBS,
    Cell,
    RecipeConfig,
    expand,
    filled_in,
    find_recipe,
    read_recipe,
)
from slimgpt.experiments.tables import SHOWN, describe, draw, to_markdown
from slimgpt.models.source import find_model
from slimgpt.pruning.inputs import check_inputs
from slimgpt.pruning.plan import PrunePlan, plan
from slimgpt.pruning.prune import prune
from slimgpt.recovery.recover import check_packages, recover
from slimgpt.runtime.environment import machine, reset_peak_memory, versions
from slimgpt.runtime.files import describe_file, write_atomically, writing
from slimgpt.runtime.locks import writing_alone
from slimgpt.runtime.run_directory import Run

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"

# Options that may name a local file or folder.
_PATHS = {"calibration", "data", "eval_data", "data_dir", "against", "teacher", "prompts"}

# Suffixes of the files that define a model in its directory.
_MODEL_FILES = {".json", ".safetensors", ".model", ".txt", ".jinja"}


class _Place(BaseModel):
    """The machine and the package versions of a step's result."""

    machine: str
    versions: dict[str, str]


_RESULTS = {
    "prune": PrunePlan,
    "recover": RecoveryReport,
    "evaluate": Evaluation,
    "bench": BenchResult,
}


@dataclass(frozen=True)
class RecipeResult:
    """The results of a recipe.

    Attributes
    ----------
    output : Path
        The directory with the results.
    report : dict
        All numbers: for each cell its labels, and the results of its steps or the error that ended
        it.
    markdown : str
        The table.
    """

    output: Path
    report: dict[str, Any]
    markdown: str

    @property
    def errors(self) -> list[str]:
        """Messages of the cells that have failed."""
        return [cell["error"] for cell in self.report["cells"] if cell["error"]]


def run_recipe(
    recipe: str | Path,
    output: str | Path,
    *,
    small: bool = False,
    data_dir: str | Path | None = None,
    keep_models: bool = False,
) -> RecipeResult:
    """Run a recipe, and write its table or figure.

    After an interruption, or with a changed recipe, the same call runs only the missing steps.

    Parameters
    ----------
    recipe : str or Path
        A YAML file with the fields of `slimgpt.experiments.recipe.RecipeConfig`, or the name of a
        recipe of the paper, like ``table6``.
    output : str or Path
        Directory for the table (``.md``), all numbers (``.json``) and the figure (``.svg``), which
        are named after the recipe. It also holds the results of steps, which recipes share.
    small : bool
        Run the small variant.
    data_dir : str or Path, optional
        Replaces ``{data}`` in the recipe.
    keep_models : bool
        Keep the pruned models; otherwise each is deleted once no further cell needs it.

    Returns
    -------
    RecipeResult
        The output directory and all results. Failed cells have an error; the next call runs them
        again.

    Raises
    ------
    SlimGPTError
        If the recipe or an option of any cell is wrong (raised before any step runs), a package is
        missing, or the output cannot be written.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.run_recipe("table6", "runs", small=True, data_dir="data")  # doctest: +SKIP
    """
    if is_torchelastic_launched():
        raise ConfigError(
            "a recipe runs in one process", hint="torchrun is for `slimgpt prune` and `recover`"
        )
    file = find_recipe(recipe)
    config = read_recipe(file, small)
    cells = expand(config, data_dir)
    _check(config, cells)
    directory = Path(output)
    with writing(directory):
        for folder in ("steps", "models"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
    with writing_alone(directory, lock_file=directory / LOCK_FILE):
        rows = _run(cells, directory.resolve(), keep_models)
        report = {"is_small": small, "recipe": config.model_dump(mode="json"), "cells": rows}
        table, numbers, figure = (f"{file.stem}.{kind}" for kind in ("md", "json", "svg"))
        result = RecipeResult(directory, report, to_markdown(report, figure))
        with suppress(OSError):  # raised if it is not empty
            (directory / "models").rmdir()
        with writing(directory):
            if config.figure:
                draw(report, directory / figure)
            write_atomically(directory / numbers, json.dumps(report, indent=1) + "\n")
            write_atomically(directory / table, result.markdown)
        return result


def _run(cells: Sequence[Cell], directory: Path, keep_models: bool) -> list[dict[str, Any]]:
    """Run the steps of each cell; a failed cell has an error instead of results.

    A full disk ends the recipe, because every later cell would fail as well.
    """
    rows = []
    for index, cell in enumerate(cells):
        log.info("cell %d/%d: %s", index + 1, len(cells), describe(cell.labels))
        row: dict[str, Any] = {"labels": cell.labels, "model": cell.model, "error": None}
        try:
            row |= _Work(cell, directory).results()
        except (MissingDependencyError, RunStateError):  # not the cell's fault
            raise
        except Exception as err:  # the other cells still run
            known = err if isinstance(err, SlimGPTError) else resource_error(err)
            log.debug("the cell failed", exc_info=err)
            if known and is_disk_full(err):  # later cells would fail too
                raise known from None
            if known:
                row["error"] = "; ".join(filter(None, (str(known), known.hint)))
            else:
                row["error"] = f"internal error: {type(err).__name__}: {err}"
            log.warning("%s: %s", describe(cell.labels), row["error"])
        else:
            if not keep_models:
                later = (_Work(other, directory).models() for other in cells[index + 1 :])
                for model in _Work(cell, directory).models().difference(*later):
                    shutil.rmtree(model, ignore_errors=True)
        rows.append(row)
    return rows


def _check(recipe: RecipeConfig, cells: list[Cell]) -> None:
    """Check packages, models, data and options of all cells before any step runs."""
    for name in (*recipe.table, *recipe.figure):
        verb = SHOWN[name].verb
        if all(getattr(cell, verb) is None for cell in cells):
            raise ConfigError(
                f"{name} comes from `{verb}`, which the recipe has no options for",
                hint=f"add a line `{verb}: {{}}`, or take {name} out of table and figure",
            )
    if recipe.figure and find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", "a figure", "pip install 'slimgpt[report]'")
    for cell in cells:
        find_model(cell.model)
        if not cell.is_dense:
            check_inputs(PruneConfig.create(**cell.prune))
        if cell.recover is not None:
            recovery = RecoverConfig.create(**cell.recover)
            check_packages(recovery)
            for name in recovery.sources:
                check_dataset(name, "calibration")
            check_dataset(recovery.eval_data, "evaluation")
    options = (cell.evaluate for cell in cells if cell.evaluate is not None)
    for evaluation in dict.fromkeys(EvalConfig.create(**values) for values in options):
        _check_evaluation(evaluation)
        if "layer_errors" in recipe.figure and not (evaluation.against and evaluation.data):
            raise ConfigError(
                "layer_errors need data and against in the options of evaluate",
                hint="name a text and the base model there",
            )


def _check_evaluation(config: EvalConfig) -> None:
    for text in config.data:
        check_dataset(text, "evaluation")
    names = Counter(describe_dataset(text, "evaluation") for text in config.data)
    if double := [name for name, number in names.items() if number > 1]:
        raise ConfigError(
            f"several texts to evaluate on have the name {double[0]}, like their results",
            hint="rename the files",
        )
    if config.against:
        find_model(config.against)
    if config.tasks:
        check_tasks(config.tasks, config.data_dir, config.num_fewshot)


@dataclass(frozen=True)
class _Work:
    """Runs the steps of a cell and stores their results in a directory."""

    cell: Cell
    directory: Path

    def results(self) -> dict[str, Any]:
        """Run the unfinished steps; return the results of all steps, by name."""
        cell = self.cell
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "prune": self._prune,
            "recover": lambda: read_report(Path(self._measured(), RECOVERY_FILE), RecoveryReport),
            "evaluate": lambda: asdict(evaluate(self._measured(), **cell.evaluate or {})),
            "bench": lambda: asdict(bench(self._measured(), **cell.bench or {})),
        }
        results = {}
        for verb, step in steps.items():
            if getattr(cell, verb) is None:
                continue
            file = self.directory / "steps" / f"{verb}-{self._key(verb)}.json"
            results[verb] = self._stored(file, verb)
            if results[verb] is None:
                place = {"machine": _machine(), "versions": versions()}
                no_folder = {f"{self.directory / 'models'}{os.sep}": ""}
                text = json.dumps(filled_in(place | step(), no_folder), indent=1) + "\n"
                with writing(self.directory):
                    write_atomically(file, text)
                results[verb] = json.loads(text)
        return results

    def _stored(self, file: Path, verb: str) -> dict[str, Any] | None:
        """Read the stored result of a step, if it has the form of this version."""
        if not file.exists():
            return None
        try:
            result = read_typed(file, dict[str, Any])
            for kind in (_RESULTS[verb], _Place):
                TypeAdapter(kind).validate_python(result)
        except (ConfigError, ValidationError) as err:
            reason = " ".join(str(err).split())
            log.warning("%s is not used, and the step is done again: %s", file, reason)
            return None
        return result

    def models(self) -> set[Path]:
        """Directories of the models that the steps make."""
        made = {"prune": not self.cell.is_dense, "recover": self.cell.recover is not None}
        return {self._model(verb) for verb, is_made in made.items() if is_made}

    def _prune(self) -> dict[str, Any]:
        if self.cell.is_dense:
            return asdict(plan(self.cell.model, **self.cell.prune))
        is_peak_of_run = reset_peak_memory()
        report = read_report(Path(self._pruned(), REPORT_FILE), PruningReport)
        del report["blocks"]  # long: the kept units of every block
        return report if is_peak_of_run else report | {"peak_memory_bytes": None}

    def _pruned(self) -> str:
        """Return the pruned model; prune it if it does not exist."""
        if self.cell.is_dense:
            return self.cell.model
        return self._made("prune", partial(prune, self.cell.model, **self.cell.prune))

    def _measured(self) -> str:
        """Return the model to measure; prune and recover it if it does not exist."""
        if self.cell.recover is None:
            return self._pruned()
        options = self.cell.recover
        return self._made(
            "recover",
            lambda output, **state: recover(self._pruned(), output, **options, **state),
        )

    def _made(self, verb: str, make: Callable[..., Any]) -> str:
        output = self._model(verb)
        if not Run(output).is_complete:
            try:
                make(output=output)
            except (OtherRunError, DamagedRunError) as err:  # files or the device have changed
                log.warning("%s: it is begun anew", err)
                make(output=output, restart=True)
        return str(output)

    def _model(self, verb: str) -> Path:
        # A run cannot be continued with other package versions, so the name contains them.
        return self.directory / "models" / f"{verb}-{_hash([self._key(verb), versions()])}"

    def _key(self, verb: str) -> str:
        """Hash of everything that determines a step's result: all options so far, local files."""
        depends: list[Any] = [self.cell.model, _files([self.cell.model])]
        for name in dict.fromkeys(("prune", "recover", verb)):
            options = getattr(self.cell, name)
            if options is not None:
                values = VERBS[name].create(**options).model_dump(mode="json")
                files = _files(value for option, value in values.items() if option in _PATHS)
                depends.append({name: values, "files": files})
            if name == verb:
                break
        return _hash(depends)


def _hash(values: list[Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _files(values: Iterable[Any]) -> list[str]:
    """Descriptions of all files that the values name, and of the files in named folders."""
    names = (n for value in values for n in (value if isinstance(value, list) else [value]))
    paths = [Path(name) for name in names if isinstance(name, str) and Path(name).exists()]
    files = (file for path in paths for file in _contents(path))
    return [describe_file(file) for file in sorted(files) if file.is_file()]


def _contents(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    if (path / "config.json").is_file():  # a model; other commands add files to its directory
        return [file for file in path.iterdir() if file.suffix in _MODEL_FILES]
    return path.rglob("*")


def _machine() -> str:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([machine(), f"{os.cpu_count()} CPUs", *gpus])
