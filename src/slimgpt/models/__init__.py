"""Find, check and load checkpoints; describe where each family has its prunable tensors."""
