"""Find, check and load checkpoints, and where their prunable tensors are."""
