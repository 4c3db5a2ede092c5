"""Run grids of experiments from recipes, and write tables and figures (``slimgpt run``)."""
