"""The results of a recipe as a Markdown table and a figure."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

# lm-eval's metrics that are shares of the questions or between 0 and 1 like them.
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

Best = Callable[[Iterable[float]], float]


@dataclass(frozen=True)
class Columns:
    """Columns of a table, made from the result of one step.

    Attributes
    ----------
    verb : str
        The step.
    read : callable
        Gives the values of a row, by the header of their column.
    style : str
        Format specification of the values.
    best : callable
        Gives, by the same headers, which value is shown in bold, of the rows with the same ratio;
        if it has a standard error, only where it differs from all others by more than that of the
        difference.
    errors : callable
        Gives the standard errors of values, by the same headers.
    """

    verb: str
    read: Callable[[Values], dict[str, float]]
    style: str
    best: Callable[[Values], dict[str, Best]] = lambda _: {}
    errors: Callable[[Values], dict[str, float]] = lambda _: {}


@dataclass(frozen=True)
class Curves:
    """A panel of a figure with one curve for each row, made from the result of one step.

    Attributes
    ----------
    verb : str
        The step.
    read : callable
        Gives the points of a row.
    axis : str
        What x stands for.
    """

    verb: str
    read: Callable[[Values], Points]
    axis: str


def _pruning(report: Values) -> dict[str, float]:
    seconds, peak = report.get("seconds", {}), report.get("peak_memory_bytes")
    values = {
        "pruning, s": sum(seconds.values()) or None,
        "peak memory, GiB": peak / 2**30 if peak else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _perplexity(evaluation: Values) -> dict[str, float]:
    return {
        f"perplexity, {short_name(r['data'])} × {r['seqlen']}": r["perplexity"]
        for r in evaluation["perplexity"]
    }


def _tasks(evaluation: Values) -> dict[str, float]:
    return {_task(r): _scale(r) * r["value"] for r in evaluation["tasks"]}


def _task_errors(evaluation: Values) -> dict[str, float]:
    scored = (r for r in evaluation["tasks"] if r["stderr"] is not None)
    return {_task(r): _scale(r) * r["stderr"] for r in scored}


def _best_tasks(evaluation: Values) -> dict[str, Best]:
    return {_task(r): max if r["higher_is_better"] else min for r in evaluation["tasks"]}


def _task(result: Values) -> str:
    return f"{result['task']}, {result['metric']}"


def _scale(result: Values) -> int:
    return 100 if result["metric"].partition(",")[0] in SHARES else 1


def _means(evaluation: Values) -> dict[str, float]:
    return {name: value for name, value in _tasks(evaluation).items() if name.endswith(f", {MEAN}")}


def _inference(result: Values) -> dict[str, float]:
    values = {}
    for setting in result["settings"]:
        where = f"{setting['batch_size']} × {setting['prompt_length']}"
        for phase in ("prefill", "decode"):
            values[f"{phase} {where}, tok/s"] = setting["model"][phase]["median"]
            if setting[f"{phase}_speedup"]:
                values[f"{phase} {where}, × base"] = setting[f"{phase}_speedup"]["median"]
    cost = result["costs"][0]
    sizes = {"weights, MiB": cost["disk_bytes"], "peak memory, MiB": cost["peak_memory_bytes"]}
    return values | {name: size / 2**20 for name, size in sizes.items() if size is not None}


MEASURES = {
    "parameters": Columns("prune", lambda report: {"parameters": report["params_after"]}, ",d"),
    "pruning": Columns("prune", _pruning, ".1f"),
    "perplexity": Columns(
        "evaluate", _perplexity, ".2f", lambda r: dict.fromkeys(_perplexity(r), min)
    ),
    "tasks": Columns("evaluate", _tasks, ".1f", _best_tasks, _task_errors),
    "means": Columns("evaluate", _means, ".1f", _best_tasks, _task_errors),
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
        Name of the figure beside the Markdown, if the recipe has one.
    """
    recipe, rows = report["recipe"], report["cells"]
    source = f"{recipe['reproduces']} of SlimGPT (arXiv 2412.18110)"
    parts = [
        f"# {escaped(recipe['title'])}",
        f"{source}, small variant." if report["is_small"] else f"{source}.",
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
        results = [row.get(measure.verb) for row in rows]
        read = [measure.read(result) if result else {} for result in results]
        errors = [measure.errors(result) if result else {} for result in results]
        for header in dict.fromkeys(header for values in read for header in values):
            cells = [
                (values[header], error.get(header, 0.0)) if header in values else None
                for values, error in zip(read, errors, strict=True)
            ]
            places = list(zip(ratios, cells, strict=True))
            bests = (measure.best(result).get(header) for result in results if result)
            best = next(filter(None, bests), None)
            columns[header] = [
                _cell(cell, [c for r, c in places if c and r == ratio], measure.style, best)
                if cell
                else ""
                for ratio, cell in places
            ]
    if any(row["error"] for row in rows):
        columns["failed"] = [escaped(row["error"] or "") for row in rows]
    return markdown_table(map(escaped, columns), zip(*columns.values(), strict=True))


def _cell(
    cell: tuple[float, float], rivals: list[tuple[float, float]], style: str, best: Best | None
) -> str:
    """A value and its standard error; in bold if it is the best of its rivals."""
    value, error = cell
    text = f"{value:{style}}"
    differences = [(abs(value - v), math.hypot(error, e)) for v, e in rivals if v != value]
    is_best = best and differences and value == best(v for v, _ in rivals)
    if is_best and all(difference > noise for difference, noise in differences):
        text = f"**{text}**"
    return f"{text} ± {error:{style}}" if error else text


def _protocol(rows: Sequence[Values]) -> str:
    """How the numbers were measured: a list of facts, each of them once."""
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
        Where to write it.
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
    """The points of a row in each panel that a measure or a curve makes."""
    shown = SHOWN[name]
    if shown.verb not in row:
        return {}
    if isinstance(shown, Curves):
        return {name: shown.read(row[shown.verb])}
    values = shown.read(row[shown.verb])
    return {header: [(row["labels"][x], value)] for header, value in values.items()}


def _label(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{100 * value:g} %" if name == RATIO and not isinstance(value, str) else str(value)


def _numbered(values: Iterable[float]) -> Points:
    return list(enumerate(values))
