"""The inputs that all phases of a recovery share."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from slimgpt.config import RecoverConfig
from slimgpt.data.prompts import Prompts
from slimgpt.models.source import Source
from slimgpt.recovery.methods.base import RecoveryMethod
from slimgpt.recovery.trainer import Examples, pad_batch
from slimgpt.runtime.progress import Progress


@dataclass(frozen=True)
class Data:
    """The data sets of the Trainer, and the seconds that text and teacher have taken."""

    train: Any
    held_out: Any
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """The inputs of a recovery.

    Attributes
    ----------
    source, teacher : Source
        The model, and the dense model if it is needed.
    config : RecoverConfig
        The options, with those derived from the model.
    method : RecoveryMethod
        The method.
    tokenizer : PreTrainedTokenizerBase
        Tokenizer of the model.
    examples : list of dict or None
        What is trained on; None if the training is on text.
    prompts : Prompts or None
        What the dense model answers; if None, its texts begin with nothing.
    held_out : list of dict
        Windows that are not trained on.
    num_left_out : int
        Number of windows that are left out of a text because they are in `held_out`.
    progress : Progress
        Called after each step.
    """

    source: Source
    teacher: Source | None
    config: RecoverConfig
    method: RecoveryMethod
    tokenizer: PreTrainedTokenizerBase
    examples: Examples | None
    prompts: Prompts | None
    held_out: Examples
    num_left_out: int
    progress: Progress

    def make_trainer(
        self, data: Data, arguments: TrainingArguments, callback: TrainerCallback
    ) -> Trainer:
        """Load the model, and create a Trainer for it."""
        pad_token: Any = self.tokenizer.pad_token_id or 0
        model = self.method.load_trainable(self.source)
        if self.config.gradient_checkpointing:
            # transformers has renamed it. The reentrant kind has no gradients if embeddings are
            # frozen.
            older = getattr(model, "gradient_checkpointing_enable", None)
            enable: Any = getattr(model, "activation_checkpointing_enable", older)
            enable({"use_reentrant": False})
        trainer = self.method.make_trainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            data_collator=partial(pad_batch, pad_token=pad_token),
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
