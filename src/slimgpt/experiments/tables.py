"""Write the results of a recipe as a Markdown table and a figure."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slimgpt.data.datasets import short_name
from slimgpt.experiments.recipe import VERBS
from slimgpt.presentation.tables import escaped, markdown_table

Values = dict[str, Any]

Points = list[tuple[float, float]]

MEAN, RATIO = "mean", "ratio"

PROTOCOL = (
    "Model",
    "Calibration",
    "Recovery",
    "Perplexity",
    "Tasks, shares in %",
    "Inference",
    "Evaluated in",
    "Machine",
    "Versions",
)

# lm-eval's metrics between 0 and 1, shown times 100.
SHARES = {
    "acc",
    "acc_norm",
    "acc_bytes",
    "acc_mutual_info",
    "exact_match",
    "em",
    "f1",
    "score",
    MEAN,
}


class Value(NamedTuple):
    """A number of a table.

    Attributes
    ----------
    number, error : float
        The number and its standard error, 0 if it has none.
    best : callable or None
        ``min`` or ``max`` chooses the number in bold among the rows with the same ratio. It is bold
        only if it differs from every other number by more than the standard error of the
        difference.
    """

    number: float
    error: float = 0.0
    best: Callable[[Iterable[float]], float] | None = None


@dataclass(frozen=True)
class Columns:
    """Columns of a table, made from the result of one step.

    Attributes
    ----------
    verb : str
        Name of the step.
    read : callable
        Returns the values of a row, by column header.
    style : str
        Format specification of the numbers.
    """

    verb: str
    read: Callable[[Values], dict[str, Value]]
    style: str


@dataclass(frozen=True)
class Curves:
    """A panel of a figure with one curve for each row, made from the result of one step.

    Attributes
    ----------
    verb : str
        Name of the step.
    read : callable
        Returns the points of a row.
    axis : str
        Label of the x axis.
    """

    verb: str
    read: Callable[[Values], Points]
    axis: str


def _pruning(report: Values) -> dict[str, Value]:
    seconds, peak = sum(report.get("seconds", {}).values()), report.get("peak_memory_bytes")
    values = {"pruning, s": seconds, "peak memory, GiB": (peak or 0) / 2**30}
    return {name: Value(value) for name, value in values.items() if value}


def _perplexity(evaluation: Values) -> dict[str, Value]:
    return {
        f"perplexity, {short_name(r['data'])} × {r['seqlen']}": Value(r["perplexity"], best=min)
        for r in evaluation["perplexity"]
    }


def _tasks(evaluation: Values) -> dict[str, Value]:
    values = {}
    for r in evaluation["tasks"]:
        scale = 100 if r["metric"].partition(",")[0] in SHARES else 1
        best = max if r["higher_is_better"] else min
        numbers = scale * r["value"], scale * (r["stderr"] or 0.0)
        values[f"{r['task']}, {r['metric']}"] = Value(*numbers, best)
    return values


def _means(evaluation: Values) -> dict[str, Value]:
    return {name: value for name, value in _tasks(evaluation).items() if name.endswith(f", {MEAN}")}


def _inference(result: Values) -> dict[str, Value]:
    values = {}
    for setting in result["settings"]:
        where = f"{setting['batch_size']} × {setting['prompt_length']}"
        for phase in ("prefill", "decode"):
            values[f"{phase} {where}, tok/s"] = setting["model"][phase]["median"]
            if setting[f"{phase}_speedup"]:
                values[f"{phase} {where}, × base"] = setting[f"{phase}_speedup"]["median"]
    cost = result["costs"][0]
    sizes = {"weights, MiB": cost["disk_bytes"], "peak memory, MiB": cost["peak_memory_bytes"]}
    values |= {name: size / 2**20 for name, size in sizes.items() if size is not None}
    return {name: Value(value) for name, value in values.items()}


MEASURES = {
    "parameters": Columns("prune", lambda r: {"parameters": Value(r["params_after"])}, ",d"),
    "pruning": Columns("prune", _pruning, ".1f"),
    "perplexity": Columns("evaluate", _perplexity, ".2f"),
    "tasks": Columns("evaluate", _tasks, ".1f"),
    "means": Columns("evaluate", _means, ".1f"),
    "inference": Columns("bench", _inference, ",.2f"),
}

CURVES = {
    "layer_ratios": Curves("prune", lambda report: _numbered(report["layer_ratios"]), "layer"),
    "layer_errors": Curves(
        "evaluate", lambda r: _numbered(r["perplexity"][0]["layer_errors"] or ()), "layer"
    ),
    "train_loss": Curves("recover", lambda report: report["train_loss"], "step"),
    "held_out_perplexity": Curves("recover", lambda r: r["held_out_perplexity"], "step"),
}

SHOWN: dict[str, Columns | Curves] = MEASURES | CURVES


def describe(labels: dict[str, Any]) -> str:
    """Name a cell by its labels."""
    named = (f"{name} {_label(name, value)}" for name, value in labels.items() if value is not None)
    return ", ".join(named)


def to_markdown(report: Values, figure_file: str) -> str:
    """Write the results as Markdown.

    Parameters
    ----------
    report : dict
        See `slimgpt.experiments.runner.RecipeResult`.
    figure_file : str
        File name of the figure, which is linked if the recipe has one.
    """
    recipe, rows = report["recipe"], report["cells"]
    source = f"{recipe['reproduces']} of SlimGPT (arXiv 2412.18110)"
    variant = ", small variant" if report["is_small"] else ""
    parts = [
        f"# {escaped(recipe['title'])}",
        f"{source}{variant}." if recipe["reproduces"] else "",
        recipe["note"],
        f"![{escaped(recipe['title'])}]({figure_file})" if recipe["figure"] else "",
        _table(recipe, rows),
        _protocol(rows),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(recipe: Values, rows: Sequence[Values]) -> str:
    labels = [row["labels"] for row in rows]
    columns = {name: [escaped(_label(name, of[name])) for of in labels] for name in recipe["grid"]}
    ratios = [of.get(RATIO) for of in labels]
    for name in recipe["table"]:
        measure = MEASURES[name]
        read = [measure.read(row[measure.verb]) if row.get(measure.verb) else {} for row in rows]
        for header in dict.fromkeys(header for values in read for header in values):
            cells = list(zip(ratios, (values.get(header) for values in read), strict=True))
            columns[header] = [
                _cell(cell, [c for r, c in cells if c and r == ratio], measure.style)
                if cell
                else ""
                for ratio, cell in cells
            ]
    if any(row["error"] for row in rows):
        columns["failed"] = [escaped(row["error"] or "") for row in rows]
    return markdown_table(map(escaped, columns), zip(*columns.values(), strict=True))


def _cell(value: Value, rivals: list[Value], style: str) -> str:
    """Format a number and its standard error; in bold if it is the best among its rivals."""
    number, error, best = value
    text = f"{number:{style}}"
    others = [rival for rival in rivals if rival.number != number]
    if best and others and number == best(rival.number for rival in rivals):
        differs = (abs(number - o.number) > math.hypot(error, o.error) for o in others)
        text = f"**{text}**" if all(differs) else text
    return f"{text} ± {error:{style}}" if error else text


def _protocol(rows: Sequence[Values]) -> str:
    """List how the numbers were measured, each fact only once."""
    facts: dict[str, dict[str, None]] = {kind: {} for kind in PROTOCOL}
    for row in rows:
        for kind, text in _facts(row):
            facts[kind][text] = None
    return "\n".join(f"- {kind}: {'; '.join(texts)}" for kind, texts in facts.items() if texts)


def _facts(row: Values) -> Iterator[tuple[str, str]]:
    yield "Model", row["model"]
    if calibration := row.get("prune", {}).get("calibration"):
        yield "Calibration", "{data}, {nsamples} × {seqlen} tokens".format(**calibration)
    if recovery := row.get("recover"):
        of = "{method}, {batch_size} examples a step, learning rate {learning_rate}"
        yield (
            "Recovery",
            f"{recovery['data']}, {recovery['steps']} steps, " + of.format(**recovery["config"]),
        )
    evaluation = row.get("evaluate", {"perplexity": [], "tasks": []})
    for text in evaluation["perplexity"]:
        yield "Perplexity", "{data}, {tokens:,} tokens in windows of {seqlen}".format(**text)
    means = [task for task in evaluation["tasks"] if task["metric"] == MEAN]
    for task in means or evaluation["tasks"]:
        of = "{task}, {num_docs:,} questions of {data}, {num_fewshot} shots, lm-eval {lm_eval}"
        yield "Tasks, shares in %", of.format(**task)
    for result in (*evaluation["perplexity"], *evaluation["tasks"]):
        yield "Evaluated in", result["dtype"]
    if speed := row.get("bench"):
        of = "{engine}, {device}, {threads} threads, {new_tokens} new tokens, {repeats} rounds"
        yield "Inference", f"{of.format(**speed)}, {speed['costs'][0]['dtype']}"
    for step in (row[verb] for verb in VERBS if verb in row):
        yield "Machine", step["machine"]
        yield from (("Versions", f"{name} {number}") for name, number in step["versions"].items())


def draw(report: Values, file: Path) -> None:
    """Draw the figure of a recipe.

    Parameters
    ----------
    report : dict
        See `slimgpt.experiments.runner.RecipeResult`.
    file : Path
        File to write.
    """
    from slimgpt.presentation.figures import curves, save

    recipe = report["recipe"]
    panels: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
    for row in report["cells"]:
        for name in recipe["figure"]:
            for title, points in _points(row, name, recipe["x"]).items():
                series = {key: v for key, v in row["labels"].items() if key != recipe["x"]}
                if points:
                    panels[title][describe(series)] += points
    drawn = [
        curves(
            series,
            recipe["x"] or CURVES[title].axis,
            title.replace("_", " ") if title in CURVES else title,
        )
        for title, series in panels.items()
    ]
    save(drawn, file)


def _points(row: Values, name: str, x: str | None) -> dict[str, Points]:
    """Points of a row in each panel of a measure or curve."""
    shown = SHOWN[name]
    if shown.verb not in row:
        return {}
    if isinstance(shown, Curves):
        return {name: shown.read(row[shown.verb])}
    values = shown.read(row[shown.verb])
    return {header: [(row["labels"][x], value.number)] for header, value in values.items()}


def _label(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{100 * value:g} %" if name == RATIO and not isinstance(value, str) else str(value)


def _numbered(values: Iterable[float]) -> Points:
    return list(enumerate(values))
