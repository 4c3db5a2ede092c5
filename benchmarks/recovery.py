r"""Compare ways of recovery with the same number of tokens: time, perplexity and KL divergence.

For each ratio the model is pruned once and recovered in each way. Models and measurements in the
folder --work with the same settings are reused, and an interrupted run goes on. Usage:

    python benchmarks/recovery.py --ratios 0.5 --tokens 100000 --text c4.jsonl \
        --instructions alpaca.json --eval-data validation.txt \
        --texts test.txt c4-heldout.jsonl pydocs --json recovery.json
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from environment import write_json
from measured import add_options, folder, is_complete, loss_left, measured, perplexities
from rich.console import Console
from rich.table import Table

import slimgpt
from slimgpt.data.examples import training_examples
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer

WAYS = ("lora", "lora distil", "distil", "cross-entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--text", required=True, help="plain text to calibrate and train on")
    parser.add_argument("--instructions", help="examples to train on, for lora")
    parser.add_argument("--eval-data", required=True, help="held-out text during training")
    parser.add_argument("--data-dir", type=Path, help="folder with the data of the tasks to run")
    parser.add_argument("--tasks", default="commonsense")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = [measure(args.model, "dense", 0.0, args)]
    for ratio in args.ratios:
        pruning = {
            "preset": args.preset,
            "ratio": ratio,
            "calibration": (args.text, "self") if args.preset == "default" else args.text,
            "nsamples": args.nsamples,
            "seqlen": args.sample_length,
        }
        pruned = folder(args.work, f"pruned-{ratio}", model=args.model, **pruning)
        if not is_complete(pruned):
            slimgpt.prune(args.model, pruned, **pruning)
        rows.append(measure(str(pruned), "pruned", ratio, args))
        for way in args.ways:
            options = options_of(way, args)
            output = folder(args.work, f"{way}-{ratio}", model=pruned.name, **options)
            if not is_complete(output):
                slimgpt.recover(str(pruned), output, **options)
            rows.append(measure(str(output), way, ratio, args))
            report = json.loads((output / "recovery_report.json").read_text(encoding="utf-8"))
            rows[-1]["recovery"] = report
    report_rows(rows, args)


def options_of(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Options of `slimgpt.recover`; all ways see about the same number of tokens."""
    text = {"data": (args.text, "self"), "tokens": args.tokens, "teacher": args.model}
    shared = {"eval_data": args.eval_data, "dtype": args.dtype}
    if way == "lora":  # the paper's, with smaller steps, of which there are few
        number = num_examples(args)
        return shared | {
            "data": args.instructions,
            "max_examples": number,
            "batch_size": 16,
            "learning_rate": 1e-3,
        }
    if way == "cross-entropy":  # the schedule of distillation
        steps = math.ceil(args.tokens // 512 / 2)
        every = math.ceil(steps / 10)
        return shared | text | {
            "method": "full",
            "seqlen": 512,
            "batch_size": 2,
            "micro_batch_size": 1,
            "learning_rate": 3e-4,
            "warmup_steps": math.ceil(steps / 20),
            "eval_steps": every,
            "save_steps": every,
        }  # fmt: skip
    return shared | text | {"method": "distill", "adapters": way == "lora distil"}


def num_examples(args: argparse.Namespace) -> int:
    """Number of instructions with as many tokens."""
    tokenizer = load_tokenizer(find_model(args.model))
    total = 0
    for number, example in enumerate(training_examples(args.instructions, tokenizer, 256), 1):
        total += len(example["input_ids"])
        if total >= args.tokens:
            return number
    raise SystemExit(f"{args.instructions} has only {total} tokens")


def measure(model: str, name: str, ratio: float, args: argparse.Namespace) -> dict[str, Any]:
    """Measure perplexity and KL on the texts, and the tasks if there is data for them."""
    tasks: list[Any] = []
    label = f"{name}-{ratio}"
    if args.data_dir:
        options = {"tasks": args.tasks, "data_dir": str(args.data_dir), "limit": args.limit}
        options["dtype"] = args.dtype
        place = folder(args.work, f"tasks-{label}", model=model, **options)
        tasks = measured(model, "tasks", place, **options)
    found = perplexities(model, label, args.work, args)
    return {"name": name, "ratio": ratio, "perplexity": found, "tasks": tasks}


def report_rows(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print one line for each model, and write all measurements as JSON."""
    title = (
        f"{args.model}, {args.tokens} tokens, {args.dtype}; texts: first {args.max_tokens} tokens; "
        f"tasks: {f'first {args.limit} questions' if args.limit else 'all questions'}"
    )
    table = Table("ratio", "model", "s", "of these, teacher and text", "loss left", title=title)
    for text in rows[0]["perplexity"]:
        table.add_column(f"{text['data']} × {text['seqlen']}: PPL (KL)")
    for task in rows[0]["tasks"]:
        table.add_column(f"{task['task']} ({task['metric']})")
    pruned = {row["ratio"]: row["perplexity"] for row in rows if row["name"] == "pruned"}
    for row in rows:
        cost = row.get("recovery", {"seconds": 0, "preparation_seconds": 0})
        seconds = cost["seconds"] + cost["preparation_seconds"]
        table.add_row(
            f"{row['ratio']:.0%}",
            row["name"],
            f"{seconds:.0f}" if seconds else "",
            f"{cost['preparation_seconds']:.0f}" if seconds else "",
            f"{loss_left(row['perplexity'], pruned[row['ratio']], rows[0]['perplexity']):.2f}"
            if row["name"] != "dense"
            else "",
            *(
                f"{text['perplexity']:.2f} ({text['kl_divergence'] or 0:.3f})"
                for text in row["perplexity"]
            ),
            *(f"{task['value']:.3f}" for task in row["tasks"]),
        )
    Console(width=180).print(table)
    write_json(args.json, protocol=title, models=rows)


if __name__ == "__main__":
    main()
