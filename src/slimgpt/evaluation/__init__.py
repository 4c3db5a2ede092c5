"""Measure perplexity, KL divergence and lm-eval tasks (``slimgpt eval``)."""
