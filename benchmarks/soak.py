"""Kill runs at random times until they are through, and compare what they leave with a whole run.

Usage:

    python benchmarks/soak.py [--model smollm2-135m] [--kills 50] [--seed 0]
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def fingerprint(directory: Path) -> dict[str, str]:
    """Hash of every file, without the measured times and memory in the report."""
    contents = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    report = json.loads(contents["pruning_report.json"])
    del report["seconds"], report["peak_memory_bytes"]
    contents["pruning_report.json"] = json.dumps(report).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


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
            while not (output / "config.json").exists() or (output / ".slimgpt").exists():
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
            if fingerprint(output) != fingerprint(whole):
                raise SystemExit(f"run {runs} differs after {kills} kills")
            print(f"{kills} kills, {runs} runs through, all the same", flush=True)


if __name__ == "__main__":
    main()
