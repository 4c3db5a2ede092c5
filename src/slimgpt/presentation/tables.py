"""Make text tables of results, and write them as Markdown."""

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.allocation.reallocation import SENSITIVITY_SHARE

_SPEEDS = {
    "prefill": ("prefill, tok/s", 1),
    "decode": ("decode, tok/s", 1),
    "first_token": ("first token, ms", 1000),
    "token": ("each token, ms", 1000),
}


_PHASES = ("prepare", "sensitivity", "prune", "save")


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes
    ----------
    rows : list of dict
        Cells by column; all rows have the same columns. A number may be followed by a space and its
        uncertainty.
    numbers : container of str
        Columns with measurements. The other columns are labels; the first label names the row.
    note : str
        How the numbers were measured.
    """

    rows: list[dict[str, str]]
    numbers: Container[str]
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are not empty."""
        return [column for column in self.rows[0] if any(row[column] for row in self.rows)]

    @property
    def labels(self) -> list[str]:
        """Names of the label columns, which say what was measured."""
        return [column for column in self.columns if column not in self.numbers]


def sizes(planned: Any) -> dict[str, str]:
    """Describe how many parameters were removed.

    Parameters
    ----------
    planned : PrunePlan or PruningReport
        Parameter counts and ratios.
    """
    target, asked = planned.target, f", asked for {planned.target_ratio:.2%}"
    found = {
        "Parameters": f"{planned.params_before:,} → {planned.params_after:,}",
        "Removed of all parameters, embeddings included": f"{planned.total_ratio:.2%}",
        "Removed of the prunable parameters in the blocks": f"{planned.block_ratio:.2%}"
        + ("" if target else asked),
    }
    if planned.dropped:
        found["Dropped layers"] = ", ".join(map(str, planned.dropped))
    if target:
        name = target.option.replace("_", "-")
        values = f"{target.reached:,.12g} {target.unit}, asked for {target.asked:,.12g} at most"
        found[f"Reached for --{name}"] = values
    return found


def widths_table(planned: Any) -> Table:
    """Make a table of the units that each block keeps.

    Parameters
    ----------
    planned : PrunePlan
        Shapes, widths and ratios of the blocks.
    """
    kinds = {sublayer.kind for shape in planned.shapes for sublayer in shape.sublayers}
    others = {"ffn": "channels", "experts": "experts × channels"}
    names = ("kv groups", " or ".join(name for kind, name in others.items() if kind in kinds))
    rows = []
    for index, (width, ratio) in enumerate(zip(planned.widths, planned.layer_ratios, strict=True)):
        cells = (str(w) if isinstance(w, int) else " × ".join(map(str, w)) for w in width)
        units = dict(zip(names, cells, strict=True))
        rows.append({"block": str(index), **units, "removed": f"{ratio:.1%}"})
    return Table(rows, {*names, "removed"})


def blocks_table(summary: Any) -> Table:
    """Make a table of the widths and parameters of each block.

    Parameters
    ----------
    summary : ModelSummary
        A dense or a pruned model.
    """
    names = ("heads", "kv heads", "channels", "experts", "attention", "ffn params")
    rows = [
        {"block": str(index)}
        | {name: f"{value:,}" for name, value in zip(names, asdict(block).values(), strict=True)}
        for index, block in enumerate(summary.blocks)
    ]
    return Table(rows, set(names))


def perplexity_table(results: Iterable[Any], digits: int = 2) -> Table:
    """Make a table of perplexities.

    Parameters
    ----------
    results : iterable of EvalResult
        At least one.
    digits : int
        Number of decimals of a perplexity.
    """
    rows = [
        {
            "text": result.data,
            "window": f"{result.seqlen:,}",
            "tokens": f"{result.tokens:,}",
            "precision": result.dtype,
            "perplexity": _fixed(result.perplexity, digits),
            "base perplexity": _fixed(result.base_perplexity, digits),
            "KL to base": _fixed(result.kl_divergence, 3),
            "base": result.base or "",
        }
        for result in sorted(results, key=lambda result: (result.data, result.seqlen))
    ]
    note = "Windows do not overlap; every token but the first of a window is predicted."
    return Table(rows, {"perplexity", "base perplexity", "KL to base"}, note)


def tasks_table(results: Sequence[Any]) -> Table:
    """Make a table of task scores.

    Parameters
    ----------
    results : sequence of TaskResult
        At least one.
    """
    rows = [
        {
            "task": result.task,
            "metric": result.metric,
            "shots": str(result.num_fewshot),
            "questions": f"{result.num_docs:,}",
            "data": result.data,
            "precision": result.dtype,
            "score": _score(result.value, result.stderr),
            "base score": _score(result.base_value, result.base_stderr),
            "base": result.base or "",
        }
        for result in results
    ]
    versions = ", ".join(sorted({result.lm_eval.split(",")[0] for result in results}))
    return Table(rows, {"score", "base score"}, f"lm-eval {versions}; ± is one standard error.")


def speed_table(result: Any) -> Table:
    """Make a table of the speeds and latencies in a ``BenchResult``."""
    rows = [
        {
            "measure": measure,
            "batch": f"{setting.batch_size:,} × {setting.prompt_length:,}",
            "this model": _spread(getattr(setting.model, name), scale),
            "base": _spread(getattr(setting.base, name, None), scale),
            "speed-up": _spread(getattr(setting, f"{name}_speedup", None)),
            "ideal": brief(getattr(result, f"ideal_{name}", None)),
        }
        for setting in result.settings
        for name, (measure, scale) in _SPEEDS.items()
    ]
    note = (
        f"Batch: sequences × prompt tokens. Prefill reads the prompt, decode writes "
        f"{result.new_tokens} tokens one by one; median (smallest–largest) of "
        f"{result.repeats} rounds."
    )
    return Table(rows, {"this model", "base", "speed-up", "ideal"}, note)


def cost_table(result: Any) -> Table:
    """Make a table of the sizes and the memory in a ``BenchResult``."""
    sizes = {
        "weights on disk, MiB": "disk_bytes",
        "read for each token, MiB": "step_bytes",
        "peak memory, MiB": "peak_memory_bytes",
    }
    rows = [
        {"model": role, "name": Path(cost.name).name, "precision": cost.dtype}
        | {column: _mebibytes(getattr(cost, name)) for column, name in sizes.items()}
        for role, cost in zip(("this model", "base"), result.costs, strict=False)
    ]
    return Table(rows, sizes)


def phases_table(pruning: Mapping[str, Any], recovery: Mapping[str, Any] | None) -> Table:
    """Make a table of the phases, the tokens that each has seen and the seconds that it took.

    Parameters
    ----------
    pruning : mapping
        A pruning report.
    recovery : mapping or None
        A recovery report, if there is one.
    """
    samples, seconds = pruning["calibration"], pruning["seconds"]
    num_samples, seqlen = samples["nsamples"], samples["seqlen"]
    measured = math.ceil(num_samples / SENSITIVITY_SHARE) if pruning["is_measured"] else 0
    refit = " and refit" if pruning["config"].get("refit_epochs") else ""
    tokens = {"prepare": num_samples, "sensitivity": measured, "prune": num_samples}
    names = {"prepare": "calibration text", "prune": f"pruning{refit}", "save": "writing"}
    phases = [
        (names.get(phase, phase), tokens.get(phase, 0) * seqlen, value)
        for phase, value in sorted(seconds.items(), key=lambda item: _place(item[0]))
    ]
    if recovery:
        read, window = recovery.get("num_examples") or 0, recovery["config"]["seqlen"]
        trained = recovery.get("tokens") or 0
        if budget := recovery.get("budget"):
            phases.append(("recovery: measuring the speed", 0, budget["measuring"]))
        if prepared := recovery.get("preparation_seconds"):
            phases.append(("recovery: text and predictions", read * window, prepared))
        phases.append(("recovery: training", trained, recovery["seconds"]))
    rows = [
        {"phase": name, "tokens": f"{count:,}" if count else "", "seconds": f"{value:,.1f}"}
        for name, count, value in phases
    ]
    total = sum(value for _, _, value in phases)
    rows.append({"phase": "all", "tokens": "", "seconds": f"{total:,.1f}"})
    return Table(rows, {"tokens", "seconds"})


def _place(phase: str) -> int:
    return [*_PHASES, phase].index(phase)


def brief(value: float | None) -> str:
    """Format a number with three digits, or with all digits before the point if there are more."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def escaped(text: str) -> str:
    """Escape text for one cell of a table: one line, without markup for Markdown or HTML."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(character, entity)
    return re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table whose cells are Markdown."""
    header = list(columns)
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_markdown(table: Table) -> str:
    """Write a table and its note."""
    columns = table.columns
    cells = ([escaped(row[column]) for column in columns] for row in table.rows)
    return f"{markdown_table(columns, cells)}\n\n{table.note}"


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _score(value: float | None, stderr: float | None) -> str:
    return _fixed(value, 4) + ("" if stderr is None else f" ± {stderr:.4f}")


def _spread(spread: Any, scale: int = 1) -> str:
    """Format a median with the smallest and the largest value."""
    if spread is None:
        return ""
    median, low, high = (brief(scale * v) for v in (spread.median, spread.low, spread.high))
    return f"{median} ({low}–{high})"


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:,.0f}"
