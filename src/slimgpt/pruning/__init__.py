"""Prune a model block by block: sensitivity pass, sequential pass (``slimgpt prune``)."""
