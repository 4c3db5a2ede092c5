"""Measure memory and time of pruning one layer with experts, by default Qwen3-30B-A3B's.

A checkpoint of one layer with random bfloat16 weights and a tiny vocabulary is written, pruned in a
separate process for each kind of units, and deleted. Attention stays whole. Usage:

    python benchmarks/experts.py [--units channels experts both] [--ratio 0.25] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from scale import write_tokenizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from slimgpt.pruning.memory import size


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


def prune(model: Path, output: Path, units: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune in a process of its own, and return what its report says."""
    command = [
        *(sys.executable, "-m", "slimgpt", "prune", model, "--output", output),
        *("--calibration", "pydocs", "--attention-share", "0", "--expert-units", units),
        *(f"--ratio={args.ratio}", f"--nsamples={args.nsamples}", f"--seqlen={args.seqlen}"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((output / "pruning_report.json").read_text(encoding="utf-8"))
    decided = report["blocks"][0]["sublayers"][1]
    return {
        "units": units,
        "width": report["widths"][0][1],
        "seconds": report["seconds"],
        "peak": report["peak_memory_bytes"],
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
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        written = write_model(Path(directory, "dense"), args)
        for units in args.units:
            rows.append(prune(Path(directory, "dense"), Path(directory, units), units, args))
            print(json.dumps(rows[-1]), flush=True)

    title = (
        f"one layer, {args.experts} experts of {args.width} channels, hidden {args.hidden}, top "
        f"{args.top_k}, bfloat16 ({size(written)}), {args.ratio:.0%}, {args.nsamples} × "
        f"{args.seqlen} tokens, {torch.get_num_threads()} threads"
    )
    phases = list(rows[0]["seconds"])
    table = Table("units", "kept", *phases, "peak memory", "few tokens", title=title)
    table.caption = "phases in seconds; experts with few tokens"
    for row in rows:
        kept = row["width"] if isinstance(row["width"], int) else " × ".join(map(str, row["width"]))
        seconds = (f"{row['seconds'][phase]:.1f}" for phase in phases)
        few = str(row["few_tokens"])
        table.add_row(row["units"], str(kept), *seconds, size(row["peak"]), few)
    Console(width=100).print(table)
    if args.json:
        content = {"protocol": title, "environment": environment(), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
