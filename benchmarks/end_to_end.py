"""Time of a whole run by phase, next to the floor: what no run of this kind can do without.

The floor is one forward of the dense blocks over the calibration tokens, the Gram products of the
inputs of all output projections as plain matrix multiplications, and one Cholesky decomposition
and inverse for each. Run and floor take turns. Usage:

    python benchmarks/end_to_end.py --calibration c4.jsonl [--ratio 0.5] [--repeats 3] [--json FILE]
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt import calibrate, obs, pruning
from slimgpt.checkpoint import pruned_config, save_checkpoint
from slimgpt.config import PruneConfig
from slimgpt.data import calibration_tokens
from slimgpt.families import bind, decoder_of
from slimgpt.model import find_model, load_model, load_tokenizer
from slimgpt.run import peak_memory
from slimgpt.schedule import plan_widths


class Clock:
    """Seconds spent in each phase; a phase inside another one counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time counts for a phase."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                own = whole - self._inner.pop()
                self._inner[-1] += whole
                self.seconds[phase] = self.seconds.get(phase, 0.0) + own

        return wrapper


@torch.no_grad()
def run_floor(model: PreTrainedModel, samples: Tensor) -> dict[str, float]:
    """Forward, Gram products and factorisations, without anything around them."""
    clock = Clock()
    decoder = decoder_of(model)
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


def run_slimgpt(
    model: PreTrainedModel, samples: Tensor, config: PruneConfig, tokenizer: Any
) -> dict[str, float]:
    """The whole of `slimgpt.prune` after loading, phase by phase."""
    clock = Clock()
    model = copy.deepcopy(model)
    shapes = [block.shape for block in bind(model)]
    widths = tuple(plan_widths(shapes, config.ratio, config.schedule, config.min_ratio))
    solver = ["prepare", "eliminate_units", "eliminate_channels", "compensate", "output_error"]
    with (
        mock.patch.multiple(
            obs, **{name: clock.timed("solve", getattr(obs, name)) for name in solver}
        ),
        mock.patch.multiple(
            calibrate,
            run_sublayer=clock.timed("forward", calibrate.run_sublayer),
        ),
        mock.patch.multiple(
            pruning,
            Activations=clock.timed("gram", pruning.Activations),
            pass_through=clock.timed("forward", pruning.pass_through),
            propagate=clock.timed("forward", pruning.propagate),
            embed=clock.timed("forward", pruning.embed),
        ),
    ):
        clock.timed("other", pruning.prune_blocks)(model, samples, widths, config)
    small = pruned_config(model.config, widths, config.uniform)
    with tempfile.TemporaryDirectory() as directory:
        clock.timed("save", save_checkpoint)(model, tokenizer, small, Path(directory))
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

    source = find_model(args.model)
    tokenizer = load_tokenizer(source)
    clock = Clock()
    model = clock.timed("load", load_model)(source)
    samples = calibration_tokens(args.calibration, tokenizer, args.nsamples, args.seqlen)
    config = PruneConfig.create(ratio=args.ratio)
    rounds = [
        (run_floor(model, samples), run_slimgpt(model, samples, config, tokenizer))
        for _ in range(args.repeats)
    ]

    title = (
        f"{args.model}, {args.ratio:.0%}, {args.nsamples} × {args.seqlen} tokens, "
        f"{args.repeats} rounds, {torch.get_num_threads()} threads"
    )
    table = Table("phase", "floor, s", "slimgpt, s", "ratio", title=title)
    for phase in ("forward", "gram", "solve", "other", "save"):
        floor, ours = (
            statistics.median(seconds.get(phase, 0.0) for seconds in contestant)
            for contestant in zip(*rounds, strict=True)
        )
        ratio = f"{ours / floor:.2f}" if floor else ""
        table.add_row(phase, f"{floor:.2f}" if floor else "", f"{ours:.2f}", ratio)
    totals = [
        (sum(floor.values()), sum(v for phase, v in ours.items() if phase != "save"))
        for floor, ours in rounds
    ]
    ratios = sorted(ours / floor for floor, ours in totals)
    table.add_section()
    table.add_row(
        "all but save",
        f"{statistics.median(floor for floor, _ in totals):.2f}",
        f"{statistics.median(ours for _, ours in totals):.2f}",
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})",
    )
    console = Console(width=100)
    console.print(table)
    peak = peak_memory()
    console.print(f"load {clock.seconds['load']:.1f} s; peak memory {(peak or 0) / 2**30:.2f} GiB")
    if args.json:
        content = {
            "protocol": title,
            "environment": environment(),
            "load_seconds": clock.seconds["load"],
            "peak_memory_bytes": peak,
            "rounds": [{"floor": floor, "slimgpt": ours} for floor, ours in rounds],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
