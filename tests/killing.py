"""Kill runs at chosen points, and print what happened. A program of its own: it forks.

Usage: python killing.py DIRECTORY KILLS SEED ARGUMENTS, with the arguments of `slimgpt.prune` as
JSON. A first run to the end, in DIRECTORY/whole, counts the function calls inside the package by
phase. Then each run in DIRECTORY/0, 1, … dies by SIGKILL at a call drawn from one of the phases, is
repeated and dies in the replay of finished blocks if there are any, and is repeated to its end.
"""

import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import torch

import slimgpt
from slimgpt.pruning import family_check

PACKAGE = str(Path(slimgpt.__file__).parent)
PHASES = (
    "prune_block",
    "replay_block",
    "_measured",
    "write_file",
    "replacing",
    "result",
    "publish",
)


def phase(frame: FrameType | None) -> str:
    """The innermost phase that a call belongs to."""
    while frame:
        if frame.f_code.co_name in PHASES and frame.f_code.co_filename.startswith(PACKAGE):
            return frame.f_code.co_name
        frame = frame.f_back
    return "other"


def run(output: Path, options: dict, die_in: str = "", die_at: int = 0) -> Counter[str]:
    """Prune; count the calls by phase, or die at one of them."""
    seen: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE):
            name = phase(frame)
            seen[name] += 1
            if name == die_in and seen[name] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    family_check._checked.clear()  # a fork starts like a process of its own
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
        output, name = directory / str(index), sorted(calls)[index % len(calls)]
        first = in_child(output, options, name, draw.randint(1, calls[name]))
        second = in_child(output, options, "replay_block", draw.randint(1, 40))
        last = in_child(output, options) if second else 0
        outcomes.append({"phase": name, "codes": [first, second, last]})
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
