"""Measure memory and time of pruning one layer with experts, by default Qwen3-30B-A3B's.

A checkpoint of one layer with random bfloat16 weights and a tiny vocabulary is written, pruned in a
separate process for each kind of units, and deleted. Attention stays whole. The comparison of the
model with its family's description, which precedes every run, is measured by itself. Usage:

    python benchmarks/experts.py [--units channels experts both] [--ratio 0.25] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from scale import write_tokenizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import slimgpt
from slimgpt.pruning.family_check import check_family
from slimgpt.pruning.memory import size
from slimgpt.runtime.environment import peak_memory, reset_peak_memory


def write_model(directory: Path, args: argparse.Namespace) -> int:
    """Write a dense checkpoint in the layout of the hub; return the bytes of its weights."""
    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        moe_intermediate_size=args.width,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=128,
        num_hidden_layers=1,
        vocab_size=1024,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def prune(model: str, output: str, units: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune in this process, and return time, peak memory and what was decided."""
    checked = {}

    def check(config: Any) -> Any:
        start = time.perf_counter()
        found = check_family(config)
        checked.update(seconds=time.perf_counter() - start, peak=peak_memory())
        reset_peak_memory()
        return found

    options = {"ratio": args.ratio, "nsamples": args.nsamples, "seqlen": args.seqlen}
    with mock.patch("slimgpt.pruning.inputs.check_family", check):
        slimgpt.prune(
            model, output, calibration="pydocs", attention_share=0, expert_units=units, **options
        )
    report = json.loads(Path(output, "pruning_report.json").read_text(encoding="utf-8"))
    decided, seconds = report["blocks"][0]["sublayers"][1], report["seconds"]
    seconds["prepare"] -= checked["seconds"]
    return {
        "units": units,
        "width": report["widths"][0][1],
        "seconds": {"check": checked["seconds"]} | seconds,
        "peak": report["peak_memory_bytes"],
        "check_peak": checked["peak"],
        "relative_error": decided["relative_error"],
        "few_tokens": len(decided["routing"].get("few_tokens", ())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=768, help="channels of an expert")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--units", nargs="+", default=["channels", "experts", "both"])
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--directory", type=Path, help="scratch space for two models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prune", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prune:
        print(json.dumps(prune(*args.prune, args)))
        return

    rows = []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        written = write_model(Path(directory, "dense"), args)
        for units in args.units:
            paths = Path(directory, "dense"), Path(directory, units)
            finished = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--prune", *paths, units],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            rows.append(json.loads(finished.stdout))
            print(json.dumps(rows[-1]), flush=True)

    title = (
        f"one layer, {args.experts} experts of {args.width} channels, hidden {args.hidden}, top "
        f"{args.top_k}, bfloat16 ({size(written)}), {args.ratio:.0%}, {args.nsamples} × "
        f"{args.seqlen} tokens, {torch.get_num_threads()} threads"
    )
    phases = list(rows[0]["seconds"])
    table = Table("units", "kept", *phases, "peak", "peak of check", title=title)
    table.caption = "phases in seconds; peak: memory without the check"
    for row in rows:
        kept = row["width"] if isinstance(row["width"], int) else " × ".join(map(str, row["width"]))
        seconds = (f"{row['seconds'][phase]:.1f}" for phase in phases)
        peaks = (size(row[peak]) for peak in ("peak", "check_peak"))
        table.add_row(row["units"], str(kept), *seconds, *peaks)
    Console(width=100).print(table)
    if args.json:
        content = {"protocol": title, "environment": environment(), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
