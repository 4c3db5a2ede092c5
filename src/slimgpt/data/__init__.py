"""Text for calibration, evaluation and training."""
