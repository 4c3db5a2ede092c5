"""Time the solver on one sublayer of the shapes of LLaMA 7B and 70B.

The contestants are those of benchmarks/solver.py: ours, the paper's procedure, and the floor (one
Cholesky decomposition and one inverse). Prints one JSON object for each shape and ratio. Usage:

    python sublayer.py [--device cuda] [--tiny]
"""

import argparse
import json
import warnings
from typing import Any

import torch
from environment import checked_device
from solver import DAMPING, Shape, Stopwatch, invert, solve_paper, solve_slimgpt, synthetic_layer

SHAPES = {
    "7B o_proj": Shape(4096, 4096, 128),
    "7B down_proj": Shape(4096, 11008, 1),
    "70B o_proj": Shape(8192, 8192, 1024),
    "70B down_proj": Shape(8192, 28672, 1),
}
TINY_SHAPES = {"tiny o_proj": Shape(64, 64, 16), "tiny down_proj": Shape(64, 192, 1)}
RATIOS = (0.2, 0.5)


def measure(shape: Shape, ratio: float, device: str) -> dict[str, Any]:
    """Time each contestant once, after a first run of ours on the same numbers."""
    weight_OI, hessian_II = synthetic_layer(shape, 0, device)
    damped_II = hessian_II + torch.diag(DAMPING * hessian_II.diagonal())
    problem = weight_OI, hessian_II, max(1, round(ratio * shape.num_in / shape.unit_size))
    invert(damped_II)
    lap = Stopwatch()
    invert(damped_II)
    seconds = {"floor": lap()}
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        if weight_OI.is_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        solve_slimgpt(*problem, shape.unit_size)
        if weight_OI.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    ours = solve_slimgpt(*problem, shape.unit_size)
    paper = solve_paper(*problem, shape.unit_size)
    seconds |= ours.parts | {"ours": sum(ours.parts.values()), "paper": paper.parts["all"]}
    return {"seconds": seconds, "synchronisations": len(waits), "note": paper.note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = checked_device(parser, args.device)
    for name, shape in (TINY_SHAPES if args.tiny else SHAPES).items():
        for ratio in RATIOS:
            row = {"shape": name, "ratio": ratio} | measure(shape, ratio, str(device))
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
