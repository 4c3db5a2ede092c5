"""Fine-tune a pruned model: LoRA, all weights, distillation (``slimgpt recover``)."""
