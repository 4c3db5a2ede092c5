"""``python -m slimgpt``, for launchers such as ``torchrun``."""

from slimgpt.cli import main

main()
