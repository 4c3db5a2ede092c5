"""Describe the machine and the package versions of a benchmark."""

import os
import platform
from importlib.metadata import version

import torch

from slimgpt.runtime.environment import machine


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
