"""Fine-tuning of all weights."""

from typing import Any

from slimgpt.models.loading import load_config, load_model
from slimgpt.models.source import Source
from slimgpt.models.weights import open_weights
from slimgpt.recovery.methods.base import RecoveryMethod


class Full(RecoveryMethod):
    """Train all weights."""

    def load_trainable(self, source: Source) -> Any:
        """Load the model in float32."""
        return load_model(source, "float32", "cpu").requires_grad_(True)

    def load_trained(self, source: Source, checkpoint: str) -> Any:
        """Load the trained weights in the precision of the weights before the training."""
        dtype = open_weights(source, load_config(source)).dtype
        return load_model(Source(checkpoint, checkpoint), str(dtype).removeprefix("torch."), "cpu")
