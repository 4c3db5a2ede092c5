"""The machine of a benchmark: its devices, and its description with the package versions."""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from slimgpt.errors import ConfigError
from slimgpt.models.device import find_device
from slimgpt.runtime.environment import machine


def checked_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """Find the device of the option --device; if this machine has none such, end the program."""
    try:
        return find_device(name)
    except ConfigError as err:
        parser.error(f"{err}; {err.hint}")


def environment() -> dict[str, object]:
    """Machine, threads and versions, for the JSON that a benchmark writes."""
    return {
        "machine": machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("slimgpt", "torch", "transformers")},
    }


def write_json(file: Path | None, **content: object) -> None:
    """Write the measurements of a benchmark with the environment, if a file is named."""
    if file:
        text = json.dumps({"environment": environment(), **content}, indent=1) + "\n"
        file.write_text(text, encoding="utf-8")
