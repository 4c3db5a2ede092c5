"""Runs that end before they are finished."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from slimgpt.pruning import block as module
from slimgpt.pruning import sequential
from slimgpt.pruning.sensitivity import MeasuringSlimGPT


class InterruptionError(Exception):
    """Stands for whatever ends a process."""


def fingerprint(directory: Path) -> dict[str, str]:
    """Hash of every file; measured times and memory are left out of the report."""
    report = directory / "pruning_report.json"
    values = json.loads(report.read_text())
    for measured in ("seconds", "peak_memory_bytes"):
        del values[measured]
    contents = {path.name: path.read_bytes() for path in directory.iterdir() if path != report}
    contents[report.name] = json.dumps(values).encode()
    return {name: sha256(content).hexdigest() for name, content in contents.items()}


def is_measuring(args: tuple[Any, ...]) -> bool:
    """Whether `prune_block` gets these arguments, after the block, in a sensitivity pass."""
    return isinstance(args[2], MeasuringSlimGPT)


def fail_at_block(
    index: int,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    while_measuring: bool = False,
) -> None:
    def prune_block(block: Any, *args: Any) -> Any:
        if block.index == index and is_measuring(args) == while_measuring:
            raise error
        return module.prune_block(block, *args)

    monkeypatch.setattr(sequential, "prune_block", prune_block)
