"""Adapters, trained by the loss and the KL divergence from the dense model.

References
----------
Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, Trainer

from slimgpt.data.examples import IGNORED
from slimgpt.recovery.methods.lora import LoRA
from slimgpt.recovery.trainer import RecoveryTrainer


class Distiller(RecoveryTrainer):
    """Trainer that adds the KL divergence from a teacher to the loss.

    Parameters
    ----------
    teacher : PreTrainedModel
        Has the model's vocabulary; in evaluation mode, on the training device.
    kl_weight : float
        Weight of KL(teacher ‖ model). Like the loss, the divergence is a mean over the labelled
        tokens of all examples of a step.
    **kwargs
        Arguments of the `Trainer`.
    """

    def __init__(self, teacher: Any, kl_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._teacher, self._kl_weight = teacher, kl_weight

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Add the divergence to the loss on the labels, in training only."""
        result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = result
        if model.training:
            read = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                target = self._teacher(**read, use_cache=False).logits
            is_label = inputs["labels"][:, 1:] != IGNORED
            divergence = functional.kl_div(
                outputs["logits"][:, :-1][is_label].float().log_softmax(-1),
                target[:, :-1][is_label].float().log_softmax(-1),
                reduction="sum",
                log_target=True,
            )
            # num_items_in_batch counts all processes, and their gradients are averaged.
            weight = self._kl_weight * self.accelerator.num_processes / num_items_in_batch
            loss = loss + weight * divergence
        return (loss, outputs) if return_outputs else loss


class Distill(LoRA):
    """Train adapters with a teacher."""

    needs_teacher = True

    def make_trainer(self, teacher: PreTrainedModel | None, **kwargs: Any) -> Trainer:
        """Create the trainer that adds the divergence from the teacher to the loss."""
        return Distiller(teacher, self.config.kl_weight, **kwargs)
