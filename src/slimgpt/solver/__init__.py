"""Optimal Brain Surgeon on one output projection. No Hugging Face in here."""
