"""Low-rank adapters for all linear layers.

References
----------
Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from typing import Any

from slimgpt.models.blocks import linears_of
from slimgpt.models.loading import load_model
from slimgpt.models.source import Source
from slimgpt.recovery.methods.base import RecoveryMethod


class LoRA(RecoveryMethod):
    """Train adapters, and add them to the weights."""

    package = "peft"

    def load_trainable(self, source: Source) -> Any:
        """Load the model and add adapters, which alone are trained."""
        from peft import LoraConfig, get_peft_model

        model = load_model(source, self.config.dtype, "cpu")
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=linears_of(model),
        )
        return get_peft_model(model, lora)

    def load_trained(self, source: Source, checkpoint: str) -> Any:
        """Load the model and add the adapters to its weights."""
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(load_model(source, device="cpu"), checkpoint)
        return model.merge_and_unload()
