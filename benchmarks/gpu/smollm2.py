"""Prune SmolLM2-135M by 20 and 50 %, and measure the perplexity on `pydocs`.

The options are the defaults, but for the calibration: 64 × 512 tokens, half of them from `pydocs`,
which needs no network, and half of the model's own. The results of the CPU, to compare with, are in
`smollm2-cpu.jsonl`, which this writes:

    PYTHONPATH=src:benchmarks python benchmarks/gpu/smollm2.py --device cpu \
        --output benchmarks/gpu/smollm2-cpu.jsonl

The text of `pydocs` depends on Python's version: if the two differ, compare the losses, which are
relative to the dense model on the same text. Prints one JSON object for each ratio. Usage:

    python smollm2.py [--device cuda] [--reference smollm2-cpu.jsonl] [--output FILE]
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import checked_device, environment

import slimgpt

MODEL, RATIOS = "smollm2-135m", (0.2, 0.5)
OPTIONS: dict[str, Any] = {"calibration": ("pydocs", "self"), "nsamples": 64, "seqlen": 512}
EVALUATION: dict[str, Any] = {"data": ("pydocs",), "seqlen": (2048,), "max_tokens": 8192}


def measure(ratio: float, device: str) -> dict[str, Any]:
    """Prune, and compare with the dense model; the loss is in nats per token."""
    with tempfile.TemporaryDirectory() as directory:
        output, start = Path(directory, "slim"), time.monotonic()
        slimgpt.prune(MODEL, output, ratio=ratio, device=device, **OPTIONS)
        seconds = time.monotonic() - start
        evaluated = slimgpt.evaluate(str(output), against=MODEL, device=device, **EVALUATION)
    found = evaluated.perplexity[0]
    assert found.base_perplexity
    return {
        "ratio": ratio,
        "perplexity": found.perplexity,
        "dense": found.base_perplexity,
        "loss": math.log(found.perplexity / found.base_perplexity),
        "kl_divergence": found.kl_divergence,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reference", type=Path, help="what --output wrote on the CPU")
    parser.add_argument("--output", type=Path, help="write the results there, with the machine")
    args = parser.parse_args()
    device = str(checked_device(parser, args.device))
    lines = args.reference.read_text("utf-8").splitlines() if args.reference else []
    of_cpu = {row["ratio"]: row for row in map(json.loads, lines)}
    rows = []
    for ratio in RATIOS:
        rows.append(measure(ratio, device))
        known = of_cpu.get(ratio, {})
        beside = {f"cpu_{name}": known[name] for name in rows[-1] if name in known}
        print(json.dumps(rows[-1] | beside), flush=True)
    if args.output:
        lines = [json.dumps(row | {"environment": environment()}) + "\n" for row in rows]
        args.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
