"""Measure memory and time of pruning one layer with experts, by default Qwen3-30B-A3B's.

A checkpoint of one layer with random bfloat16 weights and a tiny vocabulary is written, pruned in a
separate process for each kind of units, and deleted. Attention stays whole. With a small
``--activation-memory`` the experts are in memory-mapped files, of which the peak counts what the
kernel happens to keep; the anonymous memory is what the run needs. The comparison of the model with
its family's description, which precedes every run, is left out; ``--check`` measures it by itself.
Usage:

    python benchmarks/experts.py [--units channels experts both] [--ratio 0.25] [--check]
    python benchmarks/experts.py --activation-memory 500MB
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from environment import write_json
from rich.console import Console
from rich.table import Table
from scale import write_tokenizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import slimgpt
from slimgpt.pruning.memory import size
from slimgpt.runtime.environment import peak_memory


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
    options = {"ratio": args.ratio, "nsamples": args.nsamples, "seqlen": args.seqlen}
    options["activation_memory"] = args.activation_memory
    with mock.patch("slimgpt.pruning.inputs.check_family"), anonymous_memory() as anonymous:
        slimgpt.prune(
            model, output, calibration="pydocs", attention_share=0, expert_units=units, **options
        )
    report = json.loads(Path(output, "pruning_report.json").read_text(encoding="utf-8"))
    decided = report["blocks"][0]["sublayers"][1]
    return {
        "units": units,
        "width": report["widths"][0][1],
        "seconds": report["seconds"],
        "peak": report["peak_memory_bytes"],
        "anonymous": max(anonymous),
        "relative_error": decided["relative_error"],
        "few_tokens": len(decided["routing"].get("few_tokens", ())),
    }


@contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """Sample the memory of this process that is in no file, in bytes, ten times a second."""
    found, status, ended = [0], Path("/proc/self/status"), threading.Event()

    def sample() -> None:
        while not ended.wait(0.1):
            found.append(1024 * int(re.findall(r"RssAnon:\s+(\d+)", status.read_text())[0]))

    thread = threading.Thread(target=sample)
    thread.start()
    yield found
    ended.set()
    thread.join()


def check(model: str) -> dict[str, Any]:
    """Compare the model with the description of its family in this process."""
    start = time.perf_counter()
    slimgpt.check(model)
    return {"check": time.perf_counter() - start, "peak": peak_memory()}


def run(*arguments: Any) -> dict[str, Any]:
    """Run this script in a process of its own, and return what it prints."""
    command = [sys.executable, __file__, *sys.argv[1:], *arguments]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(finished.stdout, end="", flush=True)
    return json.loads(finished.stdout)


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
    parser.add_argument("--activation-memory", default="4GB")
    parser.add_argument("--directory", type=Path, help="scratch space for two models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="needs far more memory than pruning")
    parser.add_argument("--checked", help=argparse.SUPPRESS)
    parser.add_argument("--prune", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prune or args.checked:
        print(json.dumps(prune(*args.prune, args) if args.prune else check(args.checked)))
        return

    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        model = Path(directory, "dense")
        written = write_model(model, args)
        rows = [run("--prune", model, Path(directory, units), units) for units in args.units]
        checked = run("--checked", model) if args.check else None

    title = (
        f"one layer, {args.experts} experts of {args.width} channels, hidden {args.hidden}, top "
        f"{args.top_k}, bfloat16 ({size(written)}), {args.ratio:.0%}, {args.nsamples} × "
        f"{args.seqlen} tokens, {torch.get_num_threads()} threads"
    )
    phases = list(rows[0]["seconds"])
    table = Table("units", "kept", *phases, "peak memory", "anonymous", title=title)
    table.caption = "phases in seconds"
    if checked:
        table.caption += f"; the check takes {checked['check']:.1f} s and {size(checked['peak'])}"
    for row in rows:
        kept = row["width"] if isinstance(row["width"], int) else " × ".join(map(str, row["width"]))
        seconds = (f"{row['seconds'][phase]:.1f}" for phase in phases)
        sizes = size(row["peak"]), size(row["anonymous"])
        table.add_row(row["units"], str(kept), *seconds, *sizes)
    Console(width=100).print(table)
    write_json(args.json, protocol=title, rows=rows, check=checked)


if __name__ == "__main__":
    main()
