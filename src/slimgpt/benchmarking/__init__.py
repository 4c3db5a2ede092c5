"""Measure speed and memory in transformers, llama.cpp and vLLM (``slimgpt bench``)."""
