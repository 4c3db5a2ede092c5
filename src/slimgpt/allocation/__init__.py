"""Layer ratios and widths of every block: pure arithmetic, runs no model."""
