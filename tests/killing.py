"""Kill runs at chosen points, and print what happened. A program of its own: it forks.

Usage: python killing.py DIRECTORY KILLS SEED ARGUMENT…, with the arguments of `slimgpt.prune` as
JSON. A first run to the end, in DIRECTORY/whole, counts the function calls inside the package and
in which phase each falls. Then runs in DIRECTORY/0, 1, … die by SIGKILL at calls drawn from every
phase, and are repeated until they end.
"""

import json
import os
import random
import signal
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType

import torch

import slimgpt
from slimgpt import pruning  # noqa: F401 (before the fork)

PACKAGE = str(Path(slimgpt.__file__).parent)
PHASES = ("prune_block", "replay_block", "write_file", "replacing", "product", "publish")


def phase(frame: FrameType | None) -> str:
    """The innermost phase that a call belongs to."""
    while frame:
        if frame.f_code.co_name in PHASES and frame.f_code.co_filename.startswith(PACKAGE):
            return frame.f_code.co_name
        frame = frame.f_back
    return "other"


def run(output: Path, options: dict, die_at: int | None = None) -> dict[str, list[int]]:
    """Prune; count the calls by phase, or die at one of them."""
    count, seen = 0, defaultdict(list)

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        count += 1
        if die_at is None:
            seen[phase(frame)].append(count)
        elif count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    try:
        slimgpt.prune(output=output, **options)
    finally:
        sys.setprofile(None)
    return seen


def in_child(*args: object) -> int:
    """Run in a fork; how it ended."""
    pid = os.fork()
    if pid == 0:
        run(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    directory, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options = json.loads(sys.argv[4])
    torch.set_num_threads(1)  # a fork has no other threads
    calls = run(directory / "whole", options)
    draw = random.Random(seed)
    outcomes = []
    for index in range(kills):
        name = sorted(calls)[index % len(calls)]
        call = draw.choice(calls[name])
        killed = in_child(directory / str(index), options, call)
        resumed = in_child(directory / str(index), options)
        outcomes.append({"phase": name, "call": call, "killed": killed, "resumed": resumed})
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
