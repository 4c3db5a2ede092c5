"""Optimal Brain Surgeon for one output projection. Imports no Hugging Face packages."""
