"""Perplexity, KL divergence and tasks."""
