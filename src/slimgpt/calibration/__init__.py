"""Run blocks on the calibration samples and collect statistics of their activations."""
