"""Tables of results as plain data, and how the command line and Markdown write them."""

import io

import pytest
from rich.console import Console

import slimgpt
from slimgpt.benchmarking.results import BenchResult, Cost, Setting, Speed, Spread
from slimgpt.cli.tables import bench_lines, perplexity_lines
from slimgpt.evaluation.evaluate import TaskResult
from slimgpt.evaluation.perplexity import EvalResult
from slimgpt.presentation import tables


def evaluated(seqlen: int, base: str | None = None) -> EvalResult:
    theirs = (9.87654, 0.5) if base else (None, None)
    return EvalResult("m", base, "float32", "a|b", "0", seqlen, 1400, 12.3456, *theirs, None)


def benchmarked(with_base: bool) -> BenchResult:
    around = Spread(1234.0, 1200.0, 1300.0)
    speed = Speed(around, around, Spread(0.12, 0.1, 0.2), Spread(0.0234, 0.02, 0.03))
    up = Spread(1.5, 1.25, 1.75)
    settings = (Setting(2, 128, speed, *((speed, up, up) if with_base else (None,) * 3)),)
    costs = tuple(
        Cost(name, "float32", 2**30, 2**29, 2**28, None)
        for name in ("out/slim", "base")[: 1 + with_base]
    )
    ideals = (1.9, 1.7) if with_base else (None, None)
    return BenchResult("transformers", "cpu", {}, 1, 8, 5, costs, settings, *ideals)


def printed(lines: tuple[object, ...], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False)
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_columns_without_numbers_are_left_out() -> None:
    alone = tables.perplexity_table([evaluated(8)])
    assert alone.columns == ["text", "window", "tokens", "precision", "perplexity"]
    compared = tables.perplexity_table([evaluated(8), evaluated(16, "base")])
    assert compared.columns == list(compared.rows[0])
    assert [row["base perplexity"] for row in compared.rows] == ["", "9.88"]


def test_rows_are_ordered_by_text_and_window() -> None:
    table = tables.perplexity_table([evaluated(16), evaluated(8)])
    assert [row["window"] for row in table.rows] == ["8", "16"]


def test_markdown_of_a_table() -> None:
    lines = tables.to_markdown(tables.perplexity_table([evaluated(8, "x<y>")])).splitlines()
    columns = (
        "text | window | tokens | precision | perplexity | base perplexity | KL to base | base"
    )
    assert lines == [
        f"| {columns} |",
        "|" + " --- |" * 8,
        "| a\\|b | 8 | 1,400 | float32 | 12.35 | 9.88 | 0.500 | x&lt;y&gt; |",
        "",
        "Windows do not overlap; every token but the first of a window is predicted.",
    ]


def test_scores_have_standard_errors_where_these_are_known() -> None:
    options = ("acc", 0.5, None, True, 10, 0, "piqa.jsonl", "0.4, version 1")
    result = TaskResult("piqa", *options, "m", "b", "float32", 0.25, 0.0125)
    table = tables.tasks_table([result])
    assert table.rows[0]["score"] == "0.5000"
    assert table.rows[0]["base score"] == "0.2500 ± 0.0125"
    assert table.note == "lm-eval 0.4; ± is one standard error."


def test_speeds_and_costs() -> None:
    table = tables.speed_table(benchmarked(with_base=True))
    assert [list(row.values()) for row in table.rows][1:3] == [
        ["decode, tok/s", "2 × 128", *["1,234 (1,200–1,300)"] * 2, "1.5 (1.25–1.75)", "1.7"],
        ["first token, ms", "2 × 128", *["120 (100–200)"] * 2, "", ""],
    ]
    assert tables.speed_table(benchmarked(with_base=False)).columns == [
        "measure", "batch", "this model",
    ]  # fmt: skip
    costs = tables.cost_table(benchmarked(with_base=True))
    assert list(costs.rows[0].values()) == ["this model", "slim", "float32", "1,024", "512", ""]
    assert "peak memory, MiB" not in costs.columns


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_character_is_lost_on_a_narrow_terminal(width: int) -> None:
    result = benchmarked(with_base=True)
    assert "…" not in printed(bench_lines(result), width)
    wide = printed(perplexity_lines((evaluated(8, "base"), evaluated(16, "base"))), 200)
    assert "12.346" in wide
    assert "tokens 1,400, precision float32, base base" in wide
    assert wide.count("float32") == 1


def test_sizes_of_a_plan(tiny_checkpoint: object) -> None:
    planned = slimgpt.plan(str(tiny_checkpoint("llama")), ratio=0.3)  # type: ignore[operator]
    facts = tables.sizes(planned)
    assert facts["Parameters"] == f"{planned.params_before:,} → {planned.params_after:,}"
    assert facts["Removed of the prunable parameters in the blocks"].endswith("asked for 30.00%")
