"""Run the steps in order of worth; write what is known after each result. See run.sh."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import checked_device, environment

from slimgpt.errors import SlimGPTError
from slimgpt.models.source import find_model

HERE = Path(__file__).parent
REFERENCE = HERE / "smollm2-cpu.jsonl"
SPARE = 1.3  # how much longer than extrapolated the whole run may take

Row = dict[str, Any]


@dataclass
class Step:
    """One program of the run, and what came of it.

    Attributes
    ----------
    name : str
        Name for `--steps` and the messages.
    command : list of str
        Its arguments for Python. The program prints a JSON object per result.
    limit : float
        Seconds after which it is ended.
    status : str
        ``passed``, ``failed: …``, ``skipped: …``, or ``running``.
    seconds : float
        How long it took.
    rows : list of dict
        Its results.
    """

    name: str
    command: list[str]
    limit: float
    status: str = "waiting"
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def run(self, seconds_left: float, report: Callable[[], None]) -> None:
        """Run the program for as long as there is time; report after each result."""
        self.status, start = "running", time.monotonic()
        limit = min(self.limit, seconds_left)
        # The process is in a group of its own, with whatever it starts.
        with subprocess.Popen(
            [sys.executable, *self.command],
            cwd=HERE.parents[1],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            end_all = partial(_end_group, process.pid)
            timer = threading.Timer(limit, end_all)
            timer.start()
            try:
                self._follow(process, report)
                code = process.wait()
            finally:
                timer.cancel()
                end_all()
        self.seconds = time.monotonic() - start
        if self.seconds >= limit:
            self.status = f"failed: not finished after {limit:.0f} s"
        else:
            self.status = f"failed: exit code {code}" if code else "passed"

    def _follow(self, process: subprocess.Popen[str], report: Callable[[], None]) -> None:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                self.rows.append(json.loads(line))
                report()
            elif line.startswith(("FAILED", "ERROR")) or " passed" in line:  # of pytest
                self.rows.append({"tests": line.strip("= \n")})


def _end_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def make_steps(device: str, is_tiny: bool) -> list[Step]:
    """Create the steps, in order of worth."""
    options = ["--device", device, *(["--tiny"] if is_tiny else [])]
    marked = "cuda" if device == "cuda" else "not cuda"
    flags = ["-v", "-W", "default", "-p", "no:cacheprovider"]
    tests = ["-m", "pytest", *flags, "tests/cuda", "-m", marked]

    def program(name: str, *arguments: str) -> list[str]:
        return [str(HERE / name), *options, *arguments]

    reference = ["--reference", str(REFERENCE)] if REFERENCE.exists() else []
    whole = ["--runs", "paper:0.2", "--blocks", "4" if is_tiny else "32"]
    return [
        Step("tests", tests, 180),
        Step("blocks", program("blocks.py"), 240),
        Step("solver", program("sublayer.py"), 90),
        Step("smollm2", [str(HERE / "smollm2.py"), "--device", device, *reference], 120),
        Step("whole", program("blocks.py", *whole), 400),
    ]


def why_skipped(step: Step, steps: list[Step], is_tiny: bool, seconds_left: float) -> str | None:
    """Say why a step cannot run, if so."""
    if seconds_left < 5:
        return "no time is left"
    if step.name == "smollm2":
        if is_tiny:
            return "not tiny"
        try:
            find_model("smollm2-135m")
        except SlimGPTError as err:
            return str(err)
    if step.name == "whole":
        known = [r["seconds"] for s in steps if s.name == "blocks" for r in s.rows[:1]]
        if known and SPARE * known[0] > seconds_left:
            return f"takes about {known[0]:.0f} s, and {seconds_left:.0f} s are left"
    return None


def table(steps: list[Step]) -> str:
    """All results in short lines."""
    lines = []
    for step in steps:
        lines.append(f"{step.name:8} {step.status} ({step.seconds:.0f} s)")
        lines += [f"    {describe(row)}" for row in step.rows]
    return "\n".join(lines) + "\n"


def describe(row: Row) -> str:
    """One result in a line: nested values by name, times in seconds, memory in GiB."""
    words = []
    for name, value in row.items():
        if name == "peaks":
            words += [f"{k} {v / 2**30:.2f} GiB" for k, v in value.items() if v is not None]
        elif isinstance(value, dict):
            words.append(", ".join(f"{k} {v:.3g}" for k, v in value.items()))
        elif value not in (None, ""):
            words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "; ".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--steps", nargs="+", help="some of the steps; default: all")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds before the start")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes - args.spent
    device = checked_device(parser, args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    steps = make_steps(args.device, args.tiny)
    steps = [step for step in steps if not args.steps or step.name in args.steps]
    where = environment() | {"device": args.device, "tiny": args.tiny}
    if device.type == "cuda":
        where["gpu"], where["cuda"] = torch.cuda.get_device_name(), torch.version.cuda

    def report() -> None:
        content = {"environment": where, "steps": [asdict(step) for step in steps]}
        text = json.dumps(content, indent=1) + "\n"
        (args.output / "results.json").write_text(text, encoding="utf-8")
        (args.output / "table.txt").write_text(table(steps), encoding="utf-8")

    for step in steps:
        reason = why_skipped(step, steps, args.tiny, end - time.monotonic())
        if reason:
            step.status = f"skipped: {reason}"
        else:
            step.run(end - time.monotonic(), report)
        report()
        print(table([step]), end="", flush=True)
    failed = [step.name for step in steps if step.status.startswith("failed")]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
