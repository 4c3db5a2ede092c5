"""What the phases of a run work on."""

from dataclasses import dataclass

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from slimgpt.calibration.activations import choose_batch_size
from slimgpt.config import PruneConfig
from slimgpt.methods.base import Method
from slimgpt.models.streaming import StreamedModel
from slimgpt.pruning.memory import MemoryEstimate
from slimgpt.runtime.environment import Stopwatch
from slimgpt.runtime.progress import Progress
from slimgpt.runtime.run_directory import Run


@dataclass(frozen=True)
class Inputs:
    """What the user has given, found and opened.

    Attributes
    ----------
    config : PruneConfig
        The options.
    method : Method
        What decides which units stay.
    base_config : PreTrainedConfig
        Config of the model before.
    streamed : StreamedModel
        The model, with what the method adds to it; its weights are read block by block.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    generation_config : GenerationConfig
        Of the model.
    seqlen : int
        Tokens of a calibration sample, within the context of the model.
    stopwatch : Stopwatch
        What the phases have taken so far.
    progress : Progress
        Told of each block that is done.
    """

    config: PruneConfig
    method: Method
    base_config: PreTrainedConfig
    streamed: StreamedModel
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    seqlen: int
    stopwatch: Stopwatch
    progress: Progress


@dataclass(frozen=True)
class Job(Inputs):
    """Inputs with a place for the result, and calibration samples.

    Attributes
    ----------
    run : Run
        The run directory.
    memory : MemoryEstimate
        What the run needs.
    samples_NT : Tensor
        int64, calibration tokens of all processes.
    """

    run: Run
    memory: MemoryEstimate
    samples_NT: Tensor

    @property
    def batch_size(self) -> int:
        """Samples that go through a sublayer together."""
        return choose_batch_size(*self.samples_NT.shape)
