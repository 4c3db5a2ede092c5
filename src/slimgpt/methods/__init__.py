"""Pruning methods: which units to remove and how to update the rest; one file per method."""
