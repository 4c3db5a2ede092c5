"""Read a recipe, and expand its grid to cells."""

import math
import os
from dataclasses import dataclass
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import Field, model_validator

from slimgpt.config import (
    BenchConfig,
    EvalConfig,
    Options,
    PruneConfig,
    RecoverConfig,
    did_you_mean,
)
from slimgpt.errors import ConfigError

Measure = Literal["parameters", "pruning", "perplexity", "tasks", "means", "inference"]

Curve = Literal["layer_ratios", "layer_errors", "train_loss", "held_out_perplexity"]

# Limits of a recipe file; anything larger or nested more deeply is not a recipe.
RECIPE_BYTES, RECIPE_DEPTH, RECIPE_CELLS = 10**6, 32, 4096

# The recipes of the paper, by name.
SHIPPED = {file.stem: file for file in sorted(Path(__file__).with_name("recipes").glob("*.yaml"))}

VERBS: dict[str, type[Options]] = {
    "prune": PruneConfig,
    "recover": RecoverConfig,
    "evaluate": EvalConfig,
    "bench": BenchConfig,
}


class RecipeConfig(Options):
    """A grid of runs, and the table or figure made from their results."""

    verb = "run"

    title: str = Field(description="Title of the table.")
    reproduces: str = Field("", description="Table or figure of the paper.")
    note: str = Field("", description="Remark shown with the table.")
    model: str | None = Field(None, description="Default model of the cells.")
    prune: dict[str, Any] = Field({}, description="Options of every cell, as are the next three.")
    recover: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None
    bench: dict[str, Any] | None = None
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        description="Dimensions: values of an option of prune or of model, or named changes to "
        "model, prune, recover, evaluate and bench."
    )
    table: tuple[Measure, ...] = Field(min_length=1, description="Columns of the table.")
    figure: tuple[Literal[Measure, Curve], ...] = Field((), description="Panels of the figure.")
    x: str | None = Field(None, description="Dimension along the axis of a figure of measures.")
    small: dict[str, Any] | None = Field(None, description="Changes for the small variant.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if math.prod(map(len, self.grid.values())) > RECIPE_CELLS:
            raise ValueError(f"the grid has more than {RECIPE_CELLS} cells")
        if empty := [name for name, values in self.grid.items() if not values]:
            raise ValueError(f"the dimension {empty[0]!r} of the grid is empty")
        curves = [panel for panel in self.figure if panel in get_args(Curve)]
        if self.x is None and len(curves) < len(self.figure):
            raise ValueError("a figure of measures needs x, a dimension of numbers")
        if self.x is not None and (curves or not self.figure):
            raise ValueError(f"x={self.x!r} is for figures of measures only")
        if self.x is not None:
            values = self.grid.get(self.x)
            if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
                raise ValueError(f"x={self.x!r} is no dimension of numbers")
        return self


def find_recipe(name: str | Path) -> Path:
    """Find a recipe file, or a recipe of the package by name.

    Raises
    ------
    ConfigError
        If there is neither. The hint lists the recipes of the package.
    """
    if str(name) in SHIPPED and not os.path.isfile(name):
        return SHIPPED[str(name)]
    if not os.path.exists(name):
        raise ConfigError(
            f"cannot read the recipe {name}: there is no such file",
            hint=did_you_mean(str(name), list(SHIPPED)),
        )
    return Path(name)


def load_recipe(path: Path) -> dict[str, Any]:
    """Read the options of a recipe.

    Parameters
    ----------
    path : Path
        A YAML file whose top level maps option names to values.

    Raises
    ------
    ConfigError
        If the file is missing or has no such mapping.
    """
    hint = "a recipe is a short YAML file in UTF-8 with lines like `ratio: 0.3`"
    try:
        if not path.is_file():
            raise OSError("there is no such file")
        if path.stat().st_size > RECIPE_BYTES:
            raise ValueError(f"it has more than {RECIPE_BYTES:,} bytes")
        values = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as err:
        reason = " ".join(str(err).split())
        raise ConfigError(f"cannot read the recipe {path}: {reason}", hint=hint) from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"the recipe {path} is not a mapping of options to values", hint=hint)
    return {key.replace("-", "_"): value for key, value in values.items()}


class _RecipeLoader(yaml.SafeLoader):
    """Plain YAML: no references, which could expand without limit, and no duplicate keys."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="references (*name) are not read", problem_mark=self.peek_event().start_mark
            )
        self.depth += 1
        if self.depth > RECIPE_DEPTH:
            raise ValueError(f"it is nested more than {RECIPE_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if wrong := [key for key in keys if not isinstance(key, str)]:
            raise yaml.MarkedYAMLError(
                problem=f"the key {wrong[0]!r} is no text", problem_mark=node.start_mark
            )
        if len(set(keys)) < len(keys):
            double = next(key for key in keys if keys.count(key) > 1)
            raise yaml.MarkedYAMLError(
                problem=f"the key {double!r} stands there twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: the steps for one model.

    Attributes
    ----------
    labels : dict
        Its value in each dimension of the grid; None if the value makes no difference.
    model : str
        The dense model.
    prune, recover, evaluate, bench : dict or None
        Options of the steps; a step with None is not run. For a dense baseline the pruning ratio is
        0 and there is no recovery.
    """

    labels: dict[str, Any]
    model: str
    prune: dict[str, Any]
    recover: dict[str, Any] | None
    evaluate: dict[str, Any] | None
    bench: dict[str, Any] | None

    @property
    def is_dense(self) -> bool:
        """Whether the cell is a dense baseline, which is not pruned."""
        return self.prune == {"ratio": 0}


def read_recipe(file: Path, small: bool = False) -> RecipeConfig:
    """Read a recipe or its small variant.

    Raises
    ------
    ConfigError
        If options are wrong (the message lists all), or if there is no small variant.
    """
    values = load_recipe(file)
    recipe = RecipeConfig.create(**values)
    if not small:
        return recipe
    if recipe.small is None:
        raise ConfigError(f"the recipe {file} has no small variant", hint="run it without --small")
    return RecipeConfig.create(**_changed(values, recipe.small | {"small": None}))


def expand(recipe: RecipeConfig, data_dir: str | Path | None = None) -> list[Cell]:
    """List the cells of a grid: the product of its dimensions, with each dense baseline only once.

    Parameters
    ----------
    recipe : RecipeConfig
        Its strings may contain ``{data}`` and, for the model of the cell, ``{model}``.
    data_dir : str or Path, optional
        Replaces ``{data}``.

    Raises
    ------
    ConfigError
        If options of cells are wrong (the message lists all), or if `data_dir` is needed and
        missing.
    """
    base = {name: getattr(recipe, name) for name in ("model", *VERBS)}
    if data_dir is None and "{data}" in str([base, recipe.grid]):
        raise ConfigError(
            "the recipe reads local files from {data}", hint="name the folder with --data-dir"
        )
    cells: list[Cell] = []
    problems: dict[str, None] = {}  # an ordered set: cells share mistakes
    dimensions = [_choices(name, values) for name, values in recipe.grid.items()]
    idle = [
        name
        for name, dimension in zip(recipe.grid, dimensions, strict=True)
        if not any(_concerns_dense(changes) for _, changes in dimension)
    ]
    for choices in product(*dimensions):
        labels = dict(zip(recipe.grid, (label for label, _ in choices), strict=True))
        options = reduce(_changed, (changes for _, changes in choices), base)
        options = filled_in(options, {"{model}": str(options["model"]), "{data}": str(data_dir)})
        wrong = _problems(options)
        problems |= dict.fromkeys(wrong)
        if wrong:
            continue
        if PruneConfig.create(**options["prune"]).ratio == 0:
            options |= {"prune": {"ratio": 0}, "recover": None}
            labels |= dict.fromkeys(idle)
        cell = Cell(labels, **options)
        if cell not in cells:
            cells.append(cell)
    if problems:
        raise ConfigError(
            "the recipe has wrong options:\n  " + "\n  ".join(problems),
            hint="`slimgpt prune --help`, `recover`, `eval` and `bench` explain the options",
        )
    return cells


def _choices(name: str, values: list[Any] | dict[str, dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Labels of a dimension, each with its changes of the options."""
    if isinstance(values, dict):
        return list(values.items())
    if name == "model":
        return [(value, {"model": value}) for value in values]
    return [(value, {"prune": {name: value}}) for value in values]


def _concerns_dense(changes: dict[str, Any]) -> bool:
    """Whether the changes affect a dense baseline or how it is measured."""
    return "ratio" in (changes.get("prune") or {}) or not changes.keys() <= {"prune", "recover"}


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge changes into options; the options of a step and the dimensions of a grid are merged."""
    return base | {
        name: base[name] | value
        if isinstance(value, dict) and isinstance(base.get(name), dict)
        else value
        for name, value in changes.items()
    }


def filled_in(value: Any, places: dict[str, str]) -> Any:
    """Replace placeholders by paths in all strings of a value."""
    if isinstance(value, str):
        return reduce(lambda text, place: text.replace(place, places[place]), places, value)
    if isinstance(value, dict):
        return {str(key): filled_in(item, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [filled_in(item, places) for item in value]
    return value


def _problems(options: dict[str, Any]) -> list[str]:
    known = ["model", *VERBS]
    problems = [
        f"unknown step {name!r}: {did_you_mean(name, known)}"
        for name in options
        if name not in known
    ]
    if not isinstance(options["model"], str):
        problems.append("model is missing")
    for verb, config in VERBS.items():
        values = options[verb]
        if isinstance(values, dict):
            try:
                config.create(**values)
            except ConfigError as err:
                problems.append(f"{verb}: {err}")
        elif values is not None or verb == "prune":
            problems.append(f"{verb}={values!r} is no mapping of options")
    return problems
