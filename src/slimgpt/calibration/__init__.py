"""Run blocks over the calibration samples and collect statistics."""
