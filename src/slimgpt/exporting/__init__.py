"""Convert a checkpoint to GGUF for llama.cpp and Ollama (``slimgpt export``)."""
