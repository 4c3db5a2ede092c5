"""The machine of a benchmark: its devices, and its description with the package versions."""

import argparse
import os
import platform
from importlib.metadata import version

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
