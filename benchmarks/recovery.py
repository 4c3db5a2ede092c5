r"""Compare recovery methods with the same number of steps on the same examples.

For each ratio the model is pruned once and recovered with each method. Texts and tasks are those of
`slimgpt eval`. Models in the folder --work with the same settings are reused. Usage:

    python benchmarks/recovery.py --calibration c4.jsonl --data alpaca.json --eval-data valid.txt \
        --texts test.txt --data-dir tasks --limit 500 --learning-rate 1e-3 --json recovery.json
"""

import argparse
import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from environment import environment
from rich.console import Console
from rich.table import Table

import slimgpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--methods", nargs="+", default=["lora", "distill"])
    parser.add_argument("--preset", default="default")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True, help="examples to train on")
    parser.add_argument("--eval-data", required=True, help="held-out text during training")
    parser.add_argument("--texts", nargs="+", required=True, help="texts evaluated after training")
    parser.add_argument("--data-dir", type=Path, help="folder with the data of the tasks to run")
    parser.add_argument("--tasks", default="commonsense")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, default=Path(".recovery"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    training = {
        key: getattr(args, key)
        for key in ("data", "eval_data", "max_steps", "batch_size", "learning_rate", "dtype")
    }
    rows: list[dict[str, Any]] = [measure(args.model, "dense", 0.0, args)]
    for ratio in args.ratios:
        pruning = {
            "preset": args.preset,
            "ratio": ratio,
            "calibration": args.calibration,
            "nsamples": 64,
            "seqlen": 512,
        }
        pruned = folder(args.work, f"pruned-{ratio}", model=args.model, **pruning)
        if not is_complete(pruned):
            slimgpt.prune(args.model, pruned, **pruning)
        rows.append(measure(str(pruned), "pruned", ratio, args))
        for method in args.methods:
            options = training | ({"teacher": args.model} if method == "distill" else {})
            output = folder(args.work, f"{method}-{ratio}", model=pruned.name, **options)
            if not is_complete(output):
                slimgpt.recover(str(pruned), output, method=method, **options)
            rows.append(measure(str(output), method, ratio, args))
            report = json.loads((output / "recovery_report.json").read_text(encoding="utf-8"))
            rows[-1]["recovery"] = report
    report_rows(rows, args)


def folder(work: Path, name: str, **settings: Any) -> Path:
    """Folder of a model; its name depends on the settings."""
    return work / f"{name}-{sha256(json.dumps(settings).encode()).hexdigest()[:8]}"


def is_complete(model: Path) -> bool:
    """Whether a run has finished; an interrupted one is continued."""
    return (model / "config.json").exists()


def measure(model: str, name: str, ratio: float, args: argparse.Namespace) -> dict[str, Any]:
    """Measure perplexity on the texts, and the tasks if there is data for them."""
    options: dict[str, Any] = {"data": args.texts, "seqlen": (128, 1024), "max_tokens": 30_720}
    if args.data_dir:
        options |= {"tasks": args.tasks, "data_dir": str(args.data_dir), "limit": args.limit}
    file = folder(args.work, f"measured-{name}-{ratio}", model=model, dtype=args.dtype, **options)
    if not file.exists():
        result = slimgpt.evaluate(model, dtype=args.dtype, **options)
        args.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(result)), encoding="utf-8")
    return {"name": name, "ratio": ratio, **json.loads(file.read_text(encoding="utf-8"))}


def report_rows(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print one line for each model, and write all measurements as JSON."""
    title = (
        f"{args.model}, {args.max_steps} steps of {args.batch_size} examples, learning rate "
        f"{args.learning_rate:g}, {args.dtype}; tasks: "
        f"{f'first {args.limit} questions' if args.limit else 'all questions'}"
    )
    table = Table("ratio", "model", title=title)
    for text in rows[0]["perplexity"]:
        table.add_column(f"{text['data']} × {text['seqlen']}")
    for task in rows[0]["tasks"]:
        table.add_column(f"{task['task']} ({task['metric']})")
    for row in rows:
        table.add_row(
            f"{row['ratio']:.0%}",
            row["name"],
            *(f"{text['perplexity']:.2f}" for text in row["perplexity"]),
            *(f"{task['value']:.3f}" for task in row["tasks"]),
        )
    Console(width=160).print(table)
    if args.json:
        content = {"protocol": title, "environment": environment(), "models": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
