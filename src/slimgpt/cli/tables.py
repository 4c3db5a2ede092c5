"""Tables of the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

import slimgpt
from slimgpt.pruning.memory import size

if TYPE_CHECKING:
    from slimgpt.benchmarking.results import Spread


def perplexity_table(results: "Sequence[slimgpt.EvalResult]") -> tuple[Any, ...]:
    """Show perplexities, and those of the base model beside them."""
    table = Table("text", "window", "tokens", "perplexity", title=results[0].model)
    if results[0].base:
        table.add_column("base")
        table.add_column("KL to base")
    for result in results:
        numbers = (result.perplexity, result.base_perplexity, result.kl_divergence)
        table.add_row(
            result.data,
            str(result.seqlen),
            f"{result.tokens:,}",
            *(f"{number:.3f}" for number in numbers if number is not None),
        )
    return table, "windows do not overlap; every token but the first of a window is predicted"


def tasks_table(results: "Sequence[slimgpt.TaskResult]") -> tuple[Any, ...]:
    """Show the scores of tasks."""
    table = Table("task", "metric", "shots", "questions", "data", "score", title=results[0].model)
    if results[0].base:
        table.add_column("base")
    for column in (table.columns[0], *table.columns[5:]):
        column.no_wrap = True
    for result in results:
        pairs = ((result.value, result.stderr), (result.base_value, result.base_stderr))
        table.add_row(
            result.task,
            result.metric,
            str(result.num_fewshot),
            f"{result.num_docs:,}",
            result.data,
            *(
                f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
                for value, stderr in pairs
                if value is not None
            ),
        )
    return table, f"lm-eval {results[0].lm_eval.split(',')[0]}; ± is one standard error"


def ratio_lines(planned: "slimgpt.PrunePlan") -> tuple[str, ...]:
    """Say how many parameters are removed."""
    return (
        f"parameters: {planned.params_before:,} → {planned.params_after:,} "
        f"({planned.total_ratio:.2%} of all removed)",
        f"block parameters removed: {planned.block_ratio:.2%}, asked for "
        f"{planned.target_ratio:.2%}",
    )


def plan_table(planned: "slimgpt.PrunePlan") -> tuple[Any, ...]:
    """Show the widths of every block."""
    names = {"attention": "kv groups", "ffn": "channels"}
    kinds = [names[sublayer.kind] for sublayer in planned.shapes[0].sublayers]
    table = Table("block", *kinds, "removed")
    for index, (width, ratio) in enumerate(zip(planned.widths, planned.layer_ratios, strict=True)):
        table.add_row(str(index), *map(str, width), f"{ratio:.1%}")
    return table, *ratio_lines(planned)


def pruning_table(summary: "slimgpt.ModelSummary") -> tuple[Any, ...]:
    """Show what pruning took, where a report says it."""
    cost = summary.pruning
    if cost is None:
        return ()
    table = Table(*cost.seconds, "all", "peak memory", title="pruning took, in seconds")
    seconds = [*cost.seconds.values(), sum(cost.seconds.values())]
    peak = "" if cost.peak_memory_bytes is None else size(cost.peak_memory_bytes)
    table.add_row(*(f"{value:.1f}" for value in seconds), peak)
    return (table,)


def bench_tables(result: "slimgpt.BenchResult") -> tuple[Any, ...]:
    """Show speeds, latencies and memory of a benchmark."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def cell(spread: "Spread") -> str:
        return f"{number(spread.median)} ({number(spread.low)}–{number(spread.high)})"

    threads = f"{result.threads} threads, " if result.threads else ""
    title = f"{result.engine}, {result.device}, {threads}{result.new_tokens} new tokens"
    speeds = Table("batch", "prompt", "model", "prefill, tok/s", "decode, tok/s", title=title)
    speeds.add_column("first token, ms")
    speeds.add_column("each token, ms")
    costs = Table("model", "dtype", "weights on disk, MiB", "read for each token, MiB")
    costs.add_column("peak memory, MiB")
    names = [Path(cost.name).name for cost in result.costs]
    for setting in result.settings:
        lengths = str(setting.batch_size), str(setting.prompt_length)
        for name, speed in zip(names, (setting.model, setting.base), strict=False):
            if speed:
                times = (speed.first_token.median, speed.token.median)
                milliseconds = (number(1000 * seconds) for seconds in times)
                speeds.add_row(
                    *lengths, name, cell(speed.prefill), cell(speed.decode), *milliseconds
                )
        if setting.prefill_speedup and setting.decode_speedup:
            ratios = cell(setting.prefill_speedup), cell(setting.decode_speedup)
            speeds.add_row(*lengths, "speed-up", *ratios, end_section=True)
    if result.ideal_prefill:
        ideals = f"{result.ideal_prefill:.3g}", f"{result.ideal_decode:.3g}"
        speeds.add_row("", "", "ideal", *ideals)
    for name, cost in zip(names, result.costs, strict=True):
        sizes = (cost.disk_bytes, cost.step_bytes, cost.peak_memory_bytes)
        mebibytes = ("" if size is None else f"{size / 2**20:,.0f}" for size in sizes)
        costs.add_row(name, cost.dtype, *mebibytes)
    return speeds, costs, f"median (smallest–largest) of {result.repeats} rounds"
