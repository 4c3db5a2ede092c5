"""Measure latency and memory."""
