"""The inputs that all phases of a run share."""

from dataclasses import dataclass

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from slimgpt.allocation.reallocation import PROBE_TOKENS, probe_samples
from slimgpt.allocation.shapes import BlockShape
from slimgpt.allocation.targets import Target
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
    """The user's options, and the opened model.

    Attributes
    ----------
    config : PruneConfig
        The options.
    method : Method
        The pruning method.
    base_config : PreTrainedConfig
        Config of the dense model.
    shapes : tuple of BlockShape
        Prunable units of each block of the original model.
    target : Target or None
        The limit on the result, if the options set one instead of a ratio. It counts the blocks
        that are not dropped.
    dropped : tuple of int
        The dropped blocks, sorted; before they are chosen, as many of the last ones.
    streamed : StreamedModel
        The dense model with any biases that the method adds; weights are read block by block.
    tokenizer : PreTrainedTokenizerBase
        Tokenizer of the model.
    generation_config : GenerationConfig
        Generation config of the model.
    seqlen : int
        Tokens of a calibration sample, at most the context length of the model.
    stopwatch : Stopwatch
        Seconds of each finished phase.
    progress : Progress
        Called after each finished block.
    """

    config: PruneConfig
    method: Method
    base_config: PreTrainedConfig
    shapes: tuple[BlockShape, ...]
    target: Target | None
    dropped: tuple[int, ...]
    streamed: StreamedModel
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    seqlen: int
    stopwatch: Stopwatch
    progress: Progress


@dataclass(frozen=True)
class Job(Inputs):
    """Inputs with a run directory, a memory estimate and calibration samples.

    Attributes
    ----------
    run : Run
        The run directory.
    memory : MemoryEstimate
        The memory estimate.
    samples_NT : Tensor
        int64, the calibration tokens for all processes together.
    shared : Run
        Has what jobs for several sizes share: the samples, and the results of the sensitivity pass.
    """

    run: Run
    memory: MemoryEstimate
    samples_NT: Tensor
    shared: Run

    @property
    def probes(self) -> Tensor:
        """Held-out tokens: the start of some samples that a sensitivity pass does not use."""
        return self.samples_NT[probe_samples(len(self.samples_NT)), :PROBE_TOKENS]

    @property
    def batch_size(self) -> int:
        """Samples that go through a sublayer together."""
        return choose_batch_size(*self.samples_NT.shape)
