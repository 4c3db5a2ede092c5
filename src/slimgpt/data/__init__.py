"""Data sets and local files to tokens, for calibration, evaluation and training."""
