"""The base class of the recovery methods."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from transformers import Trainer

from slimgpt.config import RecoverConfig
from slimgpt.models.source import Source
from slimgpt.recovery.trainer import RecoveryTrainer


class RecoveryMethod(ABC):
    """A recovery method: what is trained, by which loss, and how it gets into the checkpoint.

    Attributes
    ----------
    package : str or None
        Package of the extra ``recover`` that the method needs.
    distils : bool
        Whether it trains on `slimgpt.recovery.teacher.Predictions`.
    """

    package: str | None = None
    distils: ClassVar[bool] = False

    def __init__(self, config: RecoverConfig) -> None:
        self.config = config

    @abstractmethod
    def load_trainable(self, source: Source) -> Any:
        """Load the model on the CPU, with the weights that are trained in float32."""

    def make_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer, by default with the loss on the labels.

        Parameters
        ----------
        **kwargs
            Arguments of the `Trainer`.
        """
        return RecoveryTrainer(**kwargs)

    @abstractmethod
    def load_trained(self, source: Source, checkpoint: str) -> Any:
        """Load the whole model with its trained weights, in the precision of `source`.

        Parameters
        ----------
        source : Source
            The model before the training.
        checkpoint : str
            The directory that the trainer has saved.
        """
