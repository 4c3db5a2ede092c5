r"""Compare narrower layers, fewer layers and both by what they cost at the speed that they give.

Each model is pruned with the same calibration text. The speed-up of decoding (batch size 1) is
measured beside the dense model in transformers and in llama.cpp. Models and measurements in the
folder --work are reused, and an interrupted run goes on. Usage:

    python benchmarks/depth.py --calibration c4.jsonl,self \
        --texts wikitext.txt c4-heldout.jsonl pydocs --json depth.json
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environment import write_json
from measured import add_options, folder, is_complete, perplexities
from rich.console import Console
from rich.table import Table

import slimgpt

CASES: dict[str, dict[str, Any]] = {
    "20 %": {"ratio": 0.2},
    "33 %": {"ratio": 0.33},
    "50 %": {"ratio": 0.5},
    "3 layers": {"drop_layers": 3},
    "6 layers": {"drop_layers": 6},
    "9 layers": {"drop_layers": 9},
    "33 %, of it 3 layers": {"ratio": 0.33, "drop_layers": 3},
    "50 %, of it 6 layers": {"ratio": 0.5, "drop_layers": 6},
}
ENGINES = {"transformers": {"dtype": "float32"}, "llamacpp": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--calibration", required=True, help="texts, comma-separated")
    parser.add_argument("--refit-epochs", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    models = {case: pruned(case, args) for case in args.cases}
    rows = [measure(case, model, args) for case, model in models.items()]
    report(perplexities(args.model, "dense", args.work, args), rows, args)


def pruned(case: str, args: argparse.Namespace) -> Path:
    """Prune the model, unless that was done before."""
    options = CASES[case] | {
        "calibration": args.calibration,
        "refit_epochs": args.refit_epochs,
        "nsamples": args.nsamples,
        "seqlen": args.sample_length,
    }
    output = folder(args.work, case, model=args.model, **options)
    if not is_complete(output):
        slimgpt.prune(args.model, output, **options)
    return output


def measure(case: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure speed and perplexity."""
    speeds: dict[str, Any] = {}
    shared = {"prompt_length": (128,), "new_tokens": args.new_tokens, "repeats": args.repeats}
    for engine, own in ENGINES.items():
        options = shared | own
        place = folder(args.work, f"speed-{case}-{engine}", model=str(model), **options)
        file = place.with_name(f"{place.name}.json")
        if not file.exists():
            found = slimgpt.bench(str(model), against=args.model, engine=engine, **options)
            file.write_text(json.dumps(asdict(found)), encoding="utf-8")
        speeds[engine] = json.loads(file.read_text(encoding="utf-8"))
    report = json.loads((model / "pruning_report.json").read_text(encoding="utf-8"))
    return {
        "case": case,
        "params": report["params_after"],
        "dropped": report["dropped"],
        "speeds": speeds,
        "perplexity": perplexities(str(model), case, args.work, args),
    }


def report(dense: list[Any], rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print one line for each model, and write all measurements as JSON."""
    title = (
        f"{args.model}, {args.nsamples} × {args.sample_length} tokens, {args.refit_epochs} epochs "
        f"of refit; windows of {args.seqlen} "
        f"tokens, first {args.max_tokens} tokens of each text, {args.dtype}; decoding "
        f"{args.new_tokens} tokens after 128, median of {args.repeats} (lowest to highest)"
    )
    table = Table("model", "parameters", *(f"decode, {name}" for name in ENGINES), title=title)
    for text in dense:
        table.add_column(f"{text['data']}: PPL (KL)")
    numbers = ("", *("1" for _ in ENGINES), *(f"{text['perplexity']:.2f}" for text in dense))
    table.add_row("dense", *numbers)
    for row in rows:
        spreads = [row["speeds"][name]["settings"][0]["decode_speedup"] for name in ENGINES]
        table.add_row(
            row["case"],
            f"{row['params']:,}",
            *(f"{s['median']:.2f} ({s['low']:.2f}–{s['high']:.2f})" for s in spreads),
            *(f"{t['perplexity']:.2f} ({t['kl_divergence']:.3f})" for t in row["perplexity"]),
        )
    Console(width=180).print(table)
    write_json(args.json, protocol=title, dense=dense, models=rows)


if __name__ == "__main__":
    main()
