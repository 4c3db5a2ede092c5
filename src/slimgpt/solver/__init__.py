"""Optimal Brain Surgeon for one output projection; does not import Hugging Face."""
