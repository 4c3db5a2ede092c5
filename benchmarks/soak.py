"""Kill runs at random times, flip bytes in their state, and compare the final output.

``prune``, ``recover`` and ``run`` are each killed and restarted until they finish. After some kills
one byte of a file in the state is flipped. The next run must then fail with an error that names the
file, unless it does not read the file. The byte is then restored. The final output must equal that
of an uninterrupted run. Usage:

    python benchmarks/soak.py [--model smollm2-135m] [--kills 50] [--seed 0]
"""

import argparse
import filecmp
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slimgpt.checkpoint.results import RECOVERY_FILE, REPORT_FILE
from slimgpt.runtime.run_directory import STATE_DIR, Run

CALIBRATION = ("--calibration=pydocs", "--nsamples=8", "--seqlen=128", "--ratio=0.4")
TRAINING = (
    "--data=pydocs", "--eval-data=pydocs", "--eval-tokens=512", "--seqlen=64", "--max-steps=6",
    "--max-examples=32", "--batch-size=4", "--eval-steps=3", "--save-steps=1",
)  # fmt: skip
RECIPE = """title: Soak
reproduces: nothing
model: {model}
prune: {{calibration: [pydocs], nsamples: 8, seqlen: 128}}
evaluate: {{data: [pydocs], seqlen: [128], max_tokens: 1024}}
grid: {{ratio: [0.2, 0.4]}}
table: [parameters, perplexity]
"""
HAS_TIMES = {REPORT_FILE, RECOVERY_FILE, "soak.json"}


def flip(output: Path, draw: random.Random) -> tuple[Path, bytes] | None:
    """Flip a byte of a file in the state; return the file and its original content."""
    files = sorted(
        path
        for state in output.rglob(STATE_DIR)
        for path in state.rglob("*")
        if path.is_file() and path.stat().st_size
    )
    if not files:
        return None
    file = draw.choice(files)
    before = file.read_bytes()
    place = draw.randrange(len(before))
    changed = bytes([before[place] ^ (1 << draw.randrange(8))])
    file.write_bytes(before[:place] + changed + before[place + 1 :])
    return file, before


def run_until_through(command: list[str], output: Path, length: float, draw: random.Random) -> int:
    """Kill and restart a command at random times until it finishes; return the number of kills."""
    kills, flipped = 0, None
    while not Run(output).is_complete:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=draw.uniform(0, 1.2 * length))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            if flipped is None and draw.random() < 0.3:
                flipped = flip(output, draw)
            continue
        if process.returncode == 0:
            return kills
        text = errors.decode(errors="replace")
        if flipped is None or flipped[0].name.removesuffix(".sha256") not in text:
            raise SystemExit(f"failed after {kills} kills, flipped {flipped}: {text[-2000:]}")
        flipped[0].write_bytes(flipped[1])
        flipped = None
    return kills


def files_of(output: Path) -> set[str]:
    """Files of the final output, except those that contain times."""
    names = {path.name for path in output.iterdir() if path.is_file()} - HAS_TIMES
    return {name for name in names if not name.startswith(".")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kills", type=int, default=50, help="kills per command")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe, pruned = place / "soak.yaml", place / "prune-whole"
        recipe.write_text(RECIPE.format(model=json.dumps(args.model)))
        verbs = {
            "prune": [args.model, *CALIBRATION],
            "recover": [str(pruned), *TRAINING],
            "run": [str(recipe)],
        }
        for verb, words in verbs.items():

            def command(output: Path, verb: str = verb, words: list[str] = words) -> list[str]:
                return [sys.executable, "-m", "slimgpt", verb, *words, "--output", str(output)]

            whole, start = place / f"{verb}-whole", time.monotonic()
            subprocess.run(command(whole), check=True, capture_output=True)
            length = time.monotonic() - start
            kills = runs = 0
            while kills < args.kills:
                runs += 1
                output = place / f"{verb}-{runs}"
                kills += run_until_through(command(output), output, length, draw)
                names = files_of(whole)
                same, *others = filecmp.cmpfiles(whole, output, names, shallow=False)
                if files_of(output) != names or len(same) != len(names):
                    raise SystemExit(f"{verb} {runs} differs after {kills} kills: {others}")
                print(f"{verb}: {kills} kills, {runs} runs through, all the same", flush=True)


if __name__ == "__main__":
    main()
