"""Kill runs at random times until they are through, and compare what they leave with a whole run.

Usage:

    python benchmarks/soak.py [--model smollm2-135m] [--kills 50] [--seed 0]
"""

import argparse
import filecmp
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slimgpt.card import REPORT_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory, "whole")

        def command(output: Path) -> list[str]:
            flags = ["--calibration=pydocs", "--nsamples=8", "--seqlen=128", "--ratio=0.5"]
            program = [sys.executable, "-m", "slimgpt", "prune", args.model]
            return [*program, "--output", str(output), *flags]

        start = time.monotonic()
        subprocess.run(command(whole), check=True, capture_output=True)
        length = time.monotonic() - start
        kills = runs = 0
        while kills < args.kills:
            runs += 1
            output = Path(directory, str(runs))
            while (
                not (output / "config.json").exists()
                or (output / ".slimgpt/manifest.json").exists()
            ):
                process = subprocess.Popen(
                    command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                try:
                    if process.wait(draw.uniform(0, length)):
                        raise SystemExit(f"run {runs} failed after {kills} kills")
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
            names = {path.name for path in whole.iterdir()} - {REPORT_FILE}  # that has times
            same, *others = filecmp.cmpfiles(whole, output, names, shallow=False)
            if len(same) != len(names):
                raise SystemExit(f"run {runs} differs after {kills} kills: {others}")
            print(f"{kills} kills, {runs} runs through, all the same", flush=True)


if __name__ == "__main__":
    main()
