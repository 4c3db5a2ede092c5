"""Training to predict what the dense model predicts (distillation).

References
----------
Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", arXiv
2407.14679: after pruning, the divergence alone, without the loss on the labels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction, Trainer, TrainerCallback, default_data_collator

from slimgpt.config import RecoverConfig
from slimgpt.data.examples import IGNORED
from slimgpt.models.source import Source
from slimgpt.recovery.methods.base import RecoveryMethod
from slimgpt.recovery.methods.full import Full
from slimgpt.recovery.methods.lora import LoRA
from slimgpt.recovery.teacher import TopK, divergence
from slimgpt.recovery.trainer import RecoveryTrainer, has_stalled


class Distiller(RecoveryTrainer):
    """Trainer whose loss is the KL divergence from a teacher's stored predictions.

    Its examples are those of `slimgpt.recovery.teacher.Predictions`, all of one length.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # the Trainer counts the labels of a step
        self.args.prediction_loss_only = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute this process's part of the mean divergence over the learned tokens of a step."""
        logits = _logits(model, inputs)
        is_learned = inputs["labels"][:, 1:] != IGNORED
        loss = (divergence(_target(inputs), logits) * is_learned).sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:  # the gradients are averaged over processes
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss on the tokens and, in place of predictions, the divergence."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = _logits(model, inputs)
            nll = functional.cross_entropy(
                logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
            )
            kl = divergence(_target(inputs), logits).mean(-1)
        return nll, kl, kl


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits of all tokens but the first of each window, in float32."""
    return model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1].float()


def _target(inputs: dict[str, Any]) -> TopK:
    return TopK(*(inputs[name] for name in TopK._fields))


def _mean_divergence(prediction: EvalPrediction) -> dict[str, float]:
    divergences: Any = prediction.predictions
    return {"kl": float(divergences.mean())}


class _Watch(TrainerCallback):
    """Save a checkpoint at each evaluation, and stop when the divergence falls no more."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = True
        if has_stalled(state):
            control.should_training_stop = True


class Distill(RecoveryMethod):
    """Train all weights but the embeddings, or adapters, with a teacher.

    Pruning leaves embeddings and language head as they are in the dense model, so they stay.
    """

    distils = True

    def __init__(self, config: RecoverConfig) -> None:
        super().__init__(config)
        self._trained = LoRA(config) if config.adapters else Full(config)
        self.package = self._trained.package

    def load_trainable(self, source: Source) -> Any:
        """Load the model without gradients of the embeddings."""
        model = self._trained.load_trainable(source)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
        return model

    def make_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer whose loss is the divergence from the teacher."""
        kwargs |= {
            "data_collator": default_data_collator,
            "compute_metrics": _mean_divergence,
            "callbacks": [*kwargs["callbacks"], _Watch()],
        }
        return Distiller(**kwargs)

    def load_trained(self, source: Source, checkpoint: str) -> Any:
        """Load the model with its trained weights, in the precision of `source`."""
        return self._trained.load_trained(source, checkpoint)
