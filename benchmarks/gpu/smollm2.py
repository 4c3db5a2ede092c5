"""Prune SmolLM2-135M with the defaults at 20 and 50 %, and measure the perplexity on `pydocs`.

The CPU's perplexities come from a file that this script wrote there (--reference). Prints one JSON
object for each ratio. Usage:

    python smollm2.py [--device cuda] [--reference smollm2-cpu.jsonl]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import slimgpt

RATIOS = (0.2, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reference", type=Path)
    args = parser.parse_args()
    lines = args.reference.read_text("utf-8").splitlines() if args.reference else []
    of_cpu = {row["ratio"]: row["perplexity"] for row in map(json.loads, lines)}
    for ratio in RATIOS:
        with tempfile.TemporaryDirectory() as directory:
            output, start = Path(directory, "slim"), time.monotonic()
            slimgpt.prune("smollm2-135m", output, ratio=ratio, device=args.device)
            seconds = time.monotonic() - start
            measured = slimgpt.evaluate(str(output), data=("pydocs",), device=args.device)
        row = {"ratio": ratio, "perplexity": measured.perplexity[0].perplexity, "seconds": seconds}
        print(json.dumps(row | {"cpu": of_cpu.get(ratio)}), flush=True)


if __name__ == "__main__":
    main()
