"""Train a pruned model."""
