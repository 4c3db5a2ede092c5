"""Compute layer ratios and the widths of every block. Pure arithmetic: no model runs."""
