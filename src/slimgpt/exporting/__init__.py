"""Convert a model for other engines."""
