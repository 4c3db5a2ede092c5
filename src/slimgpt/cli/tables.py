"""Tables of the command line."""

from pathlib import Path
from typing import Any

from rich import box
from rich import table as rich

import slimgpt
from slimgpt.presentation import tables
from slimgpt.pruning.memory import size


def rich_table(data: tables.Table) -> rich.Table:
    """All columns of a table, for the terminal."""
    names = list(data.rows[0])
    shown = rich.Table(*names)
    for row in data.rows:
        shown.add_row(*row.values())
    return shown


def perplexity_lines(results: "tuple[slimgpt.EvalResult, ...]") -> tuple[Any, ...]:
    """Show perplexities, and those of the base model beside them."""
    table = tables.perplexity_table(results, digits=3)
    return *_lines(table, results[0].model), table.note


def task_lines(results: "tuple[slimgpt.TaskResult, ...]") -> tuple[Any, ...]:
    """Show the scores of tasks."""
    table = tables.tasks_table(results)
    return *_lines(table, results[0].model), table.note


def bench_lines(result: "slimgpt.BenchResult") -> tuple[Any, ...]:
    """Show speeds, latencies and memory of a benchmark."""
    threads = f", threads: {result.threads}" if result.threads else ""
    speeds = tables.speed_table(result)
    title = f"{result.engine}, {result.device}{threads}"
    return *_lines(speeds, title), speeds.note, *_lines(tables.cost_table(result), "memory")


def _lines(table: tables.Table, title: str) -> tuple[Any, ...]:
    """A table, and a line with the labels that all its rows share."""
    cells = {column: {row[column] for row in table.rows} for column in table.labels[1:]}
    shared = {column: texts.pop() for column, texts in cells.items() if len(texts) == 1}
    columns = [column for column in table.columns if column not in shared]
    shown = rich.Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    for column in columns:
        justify = "right" if column in table.numbers else "left"
        shown.add_column(column, justify=justify, overflow="fold")
    for row in table.rows:
        shown.add_row(*(row[column] for column in columns))
    line = ", ".join(f"{column} {text}" for column, text in shared.items())
    return (shown, line) if line else (shown,)


def ratio_lines(planned: "slimgpt.PrunePlan") -> tuple[str, ...]:
    """Say how many parameters are removed."""
    return tuple(f"{name}: {value}" for name, value in tables.sizes(planned).items())


def recovery_lines(result: "slimgpt.RecoverResult", model: str) -> tuple[Any, ...]:
    """Show the held-out text's curves, and where the recovered model is.

    Parameters
    ----------
    result : RecoverResult
        The recovery.
    model : str
        What to call the model before it.
    """
    report, divergences = result.report, dict(result.report["held_out_kl"])
    columns = ["step", "held-out perplexity"] + ["KL"] * bool(divergences)
    table = rich.Table(*columns, title=report["held_out"])
    for step, perplexity in report["held_out_perplexity"]:
        kl = [f"{divergences[step]:.4f}"] if step in divergences else []
        table.add_row(str(step), f"{perplexity:.3f}", *kl)
    where = f"the recovered model is in {result.output}"
    if report["best_step"] == 0:
        where += f", with the weights of {model}: the training has not lowered the KL divergence"
    elif divergences:
        where += f", with the weights of step {report['best_step']}"
    if budget := report.get("budget"):
        tokens, minutes = f"{budget['tokens']:,} tokens", budget["seconds"] / 60
        where += f"; {tokens} in {minutes:.1f} minutes, asked for {budget['minutes']:g}"
    return table, where


def recovery_plan(options: dict[str, Any]) -> str:
    """Say how a pruned model will be recovered."""
    tokens, minutes = options.get("tokens"), options.get("minutes")
    budget = f"for {minutes:g} minutes" if tokens is None else f"on {tokens} tokens"
    texts = ", ".join(options["data"])
    return f"then: distilled {budget} of {texts}; held-out text: {options['eval_data']}"


def sweep_lines(points: "tuple[slimgpt.SweepPoint, ...]", output: Path) -> tuple[Any, ...]:
    """Show the curve of a sweep."""
    table = rich.Table("ratio", "parameters", "KL", box=box.SIMPLE_HEAD)
    for point in points:
        table.add_row(f"{point.ratio:g}", f"{point.params:,}", f"{point.divergence:.4f}")
    note = "KL divergence from the dense model, in nats per held-out calibration token, before the"
    return table, f"{note} refit", f"the curve is in {output}"


def check_lines(found: "slimgpt.FamilyCheck") -> tuple[Any, ...]:
    """Show what the check of a family compared."""
    table = rich.Table("block", "sublayer", "tensors that shrink", "difference")
    for sublayer in found.sublayers:
        difference = "" if sublayer.difference is None else f"{sublayer.difference:.0e}"
        names = ", ".join(sublayer.tensors) if difference else "none: nothing can be removed"
        table.add_row(str(sublayer.block), sublayer.kind, names, difference)
    blocks = ", ".join(f"{index} ({value:.0e})" for index, value in found.differences.items())
    return (
        f"{found.model_type}: the description holds, with random weights",
        f"blocks that equal the form in which they are pruned, one of each kind: {blocks}",
        "blocks with half of a sublayer's units, and the dense ones without the others:",
        table,
    )


def plan_table(planned: "slimgpt.PrunePlan") -> tuple[Any, ...]:
    """Show the widths of every block."""
    return rich_table(tables.widths_table(planned)), *ratio_lines(planned)


def pruning_table(summary: "slimgpt.ModelSummary") -> tuple[Any, ...]:
    """Show what pruning took, where a report says it."""
    cost = summary.pruning
    if cost is None:
        return ()
    table = rich.Table(*cost.seconds, "all", "peak memory", title="pruning took, in seconds")
    seconds = [*cost.seconds.values(), sum(cost.seconds.values())]
    peak = "" if cost.peak_memory_bytes is None else size(cost.peak_memory_bytes)
    table.add_row(*(f"{value:.1f}" for value in seconds), peak)
    return (table,)
