"""Inference engines, one in each module."""
