"""Time a whole run by phase, and compare it with the floor: the work that every such run needs.

The floor has three parts:

- one forward pass of the dense blocks over the calibration tokens, in the precision of the weights,
  and again in bfloat16 if runs use it;
- the Gram products of the inputs of all output projections, as plain matrix multiplications in
  float32 (a run computes one half of each, in bfloat16 if that is exact);
- one Cholesky decomposition and one inverse for each of them, in float64.

Runs and floors alternate. Correction needs a second forward pass, of the dense model, and the refit
trains on the tokens for one epoch; a run without both is also measured. The sensitivity pass is
reported as one phase. Usage:

    python benchmarks/end_to_end.py --calibration c4.jsonl [--ratio 0.5] [--repeats 3] [--json FILE]
"""

import argparse
import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from environment import write_json
from phases import PHASES, Clock, timed_phases
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import slimgpt
from slimgpt.data.samples import SampleOptions, calibration_tokens
from slimgpt.models.blocks import bind, decoder_of
from slimgpt.models.device import autocast
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.runtime.environment import peak_memory

COMPUTATION = ("forward", "gram", "solve", "refit")


@torch.no_grad()
def run_floor(
    model: PreTrainedModel, samples: Tensor, products: AbstractContextManager[object]
) -> dict[str, float]:
    """Time the forward pass, the Gram products and the factorisations alone."""
    clock = Clock()
    decoder = decoder_of(model)
    with products:
        clock.timed(
            "forward", lambda: [decoder(batch, use_cache=False) for batch in samples.split(8)]
        )()
    sizes = [sub.output.in_features for block in bind(model) for sub in block.sublayers]
    rows = {size: torch.randn(samples.numel(), size) for size in set(sizes)}
    clock.timed("gram", lambda: [rows[size].T @ rows[size] for size in sizes])()
    hessians = {
        size: (tokens.T @ tokens).double() / len(tokens) + torch.eye(size, dtype=torch.float64)
        for size, tokens in rows.items()
    }
    clock.timed(
        "solve",
        lambda: [torch.cholesky_inverse(torch.linalg.cholesky(hessians[size])) for size in sizes],
    )()
    return clock.seconds


def run_slimgpt(model: str, options: dict[str, Any]) -> dict[str, float]:
    """Time a whole run by phase."""
    with tempfile.TemporaryDirectory() as directory, timed_phases() as clock:
        clock.timed("other", slimgpt.prune)(model, Path(directory) / "slim", **options)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydocs")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    names = ("calibration", "nsamples", "seqlen", "ratio")
    options = {name: getattr(args, name) for name in names}
    source = find_model(args.model)
    text = args.calibration.removesuffix(",self")
    samples = calibration_tokens(
        text, load_tokenizer(source), SampleOptions(args.nsamples, args.seqlen)
    )
    model = load_model(source)
    rounds = [
        {
            "floor": run_floor(model, samples, nullcontext()),
            "fast floor": run_floor(model, samples, autocast(next(model.parameters()))),
            "slimgpt": run_slimgpt(args.model, options),
            "plain": run_slimgpt(args.model, options | {"correction": 0, "refit_epochs": 0}),
        }
        for _ in range(args.repeats)
    ]

    title = (
        f"{args.model}, {args.ratio:.0%}, {args.calibration}, {args.nsamples} × {args.seqlen} "
        f"tokens, {args.repeats} rounds, {torch.get_num_threads()} threads"
    )
    table = Table("phase", *(f"{name}, s" for name in rounds[0]), title=title)
    for phase in (*PHASES, "other"):
        medians = (
            statistics.median(seconds[name].get(phase, 0.0) for seconds in rounds)
            for name in rounds[0]
        )
        table.add_row(phase, *(f"{median:.2f}" if median else "" for median in medians))
    table.add_section()
    totals = {
        name: [sum(seconds[name].get(phase, 0.0) for phase in COMPUTATION) for seconds in rounds]
        for name in rounds[0]
    }
    table.add_row(
        " + ".join(COMPUTATION), *(f"{statistics.median(total):.2f}" for total in totals.values())
    )
    for reference in ("floor", "fast floor"):
        ratios = [
            [seconds / floor for seconds, floor in zip(total, totals[reference], strict=True)]
            for total in totals.values()
        ]
        table.add_row(
            f"over the {reference}",
            *(f"{statistics.median(r):.2f} ({min(r):.2f}–{max(r):.2f})" for r in ratios),
        )
    console = Console(width=100)
    console.print(table)
    peak = peak_memory()
    console.print(f"peak memory, with the dense model: {(peak or 0) / 2**30:.2f} GiB")
    write_json(args.json, protocol=title, peak_memory_bytes=peak, rounds=rounds)


if __name__ == "__main__":
    main()
