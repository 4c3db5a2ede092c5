"""The main job: prune a model block by block."""
