"""``python -m slimgpt``, for launchers such as ``torchrun``."""

from slimgpt.cli.app import main

main()
