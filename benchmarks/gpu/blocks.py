"""Prune a random model of LLaMA-7B's shape with random tokens: seconds by phase, peak memory.

Some of the blocks are pruned, all at the same ratio, and the time of all of them is extrapolated:
the phases that work on blocks grow with their number. Prints one JSON object for each run. Its
`speedup` is over the time that the paper reports (on an A100). The paper's 7.4 GB compare with
`without activations`: the peak of torch less the streams and the kept activations. Usage:

    python blocks.py [--device cuda] [--runs paper:0.2 …] [--blocks 4] [--tiny]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from environment import checked_device
from memory import watched_memory
from phases import timed_phases
from scale import write_model
from torch import Tensor

import slimgpt
from slimgpt.pruning.estimate import estimate_memory
from slimgpt.pruning.memory import MemoryEstimate

SAMPLES, TINY_SAMPLES = (256, 2048), (16, 64)

PAPER_SECONDS = {0.2: 678, 0.5: 1074}  # LLaMA-7B, for the same number of tokens

NOT_BY_BLOCK = ("other", "sample")  # phases


class Shape(NamedTuple):
    """Shape of a model of LLaMA's kind."""

    blocks: int
    hidden: int
    channels: int
    heads: int


LLAMA_7B, TINY = Shape(32, 4096, 11008, 32), Shape(4, 64, 176, 8)


def random_tokens(_name: str, _tokenizer: object, options: Any) -> Tensor:
    """Take the place of `calibration_tokens`."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(2, 32000, (options.nsamples, options.seqlen), generator=generator)


def measure(model: Path, device: torch.device, run: str, options: dict[str, Any]) -> dict[str, Any]:
    """Prune in this process; RUN is PRESET:RATIO."""
    preset, ratio = run.split(":")
    options |= {"preset": preset, "ratio": float(ratio), "calibration": "pydocs"}
    drawn = mock.patch("slimgpt.pruning.inputs.calibration_tokens", random_tokens)
    estimates: list[MemoryEstimate] = []

    def noted(*args: Any) -> MemoryEstimate:
        estimates.append(estimate_memory(*args))
        return estimates[-1]

    with (
        tempfile.TemporaryDirectory(dir=model.parent) as directory,
        watched_memory(device) as peaks,
        timed_phases() as clock,
        drawn,
        mock.patch("slimgpt.pruning.inputs.estimate_memory", noted),
    ):
        clock.timed("other", slimgpt.prune)(
            str(model), Path(directory, "slim"), device=str(device), **options
        )
    if device.type == "cuda" and peaks["torch"] is not None:
        estimate = estimates[0]
        peaks["estimate"] = estimate.gpu_memory
        peaks["without activations"] = peaks["torch"] - (estimate.gpu_memory - estimate.working)
    return {"preset": preset, "ratio": float(ratio), "phases": clock.seconds, "peaks": peaks}


def extrapolated(phases: dict[str, float], factor: float) -> float:
    """Seconds for as many blocks as the factor says."""
    return sum(s * (1 if phase in NOT_BY_BLOCK else factor) for phase, s in phases.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int)
    parser.add_argument(
        "--runs", nargs="+", default=["paper:0.2", "default:0.2", "paper:0.5", "default:0.5"]
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device, shape = checked_device(parser, args.device), TINY if args.tiny else LLAMA_7B
    num_blocks = args.blocks or shape.blocks // (2 if args.tiny else 8)
    options = dict(zip(("nsamples", "seqlen"), TINY_SAMPLES if args.tiny else SAMPLES, strict=True))
    if num_blocks < shape.blocks:
        options["schedule"] = "uniform"
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "dense")
        write_model(model, num_blocks, *shape[1:], device=args.device)
        for run in args.runs:
            row = measure(model, device, run, dict(options))
            row["blocks"], row["of"] = num_blocks, shape.blocks
            row["seconds"] = extrapolated(row["phases"], shape.blocks / num_blocks)
            if not args.tiny and row["ratio"] in PAPER_SECONDS:
                row["speedup"] = PAPER_SECONDS[row["ratio"]] / row["seconds"]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
