"""The base class of the pruning methods, and of those that only score units.

A method gets the statistics of one sublayer at a time, selects the units to keep and updates their
weights. Calibration, schedule and slicing are the same for all methods. Each layer therefore has
the same pruning ratio with every method, even with those whose authors rank all layers together.

Shape suffixes: ``O`` out features, ``I`` in features, ``U`` units, ``K`` kept columns, ``R``
removed columns, ``N`` samples, ``T`` tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimgpt.allocation.reallocation import Curve
from slimgpt.allocation.shapes import BlockWidths, Width
from slimgpt.calibration.activations import Activations, Stream
from slimgpt.config import PruneConfig
from slimgpt.models.blocks import bind, linears_of
from slimgpt.models.experts import Experts
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import Kept
from slimgpt.solver.hessian import output_power


class Decision(NamedTuple):
    """The decision of a method for one sublayer.

    Attributes
    ----------
    kept : Kept
        The units to keep.
    weight_OK : Tensor
        The kept columns of the output projection, updated by the method.
    error, power : float
        E‖Δy‖² and E‖y‖² over the calibration tokens.
    bias_O : Tensor or None
        New bias of the output projection; None leaves the bias unchanged.
    damping : float
        Damping that the Hessian needed, if one was factorised.
    curve : Curve
        In a sensitivity pass, the errors at other widths.
    """

    kept: Kept
    weight_OK: Tensor
    error: float
    power: float
    bias_O: Tensor | None = None
    damping: float = 0.0
    curve: Curve = ()


class Method(ABC):
    """A pruning method: selects the units to keep in each sublayer.

    Attributes
    ----------
    package : str or None
        Package of the extra ``recover`` that the method needs.
    needs_gradients : bool
        Whether `score_model` takes gradients of the whole model, which is then in memory.
    needs_dense : bool
        Whether calibration also runs the dense model's residual stream.
    removes : frozenset of str
        What the method can remove: ``groups`` of attention, ``channels`` of FFNs, ``channels of
        experts``, and whole ``experts``.
    compensates : bool
        Whether the kept weights are updated for what is gone.
    refit_epochs : int
        Epochs of the refit of each pruned FFN.
    within : dict of (int, str) to tuple of int
        By block and kind of sublayer, the only units that may stay; all where it is left out.
    scores : dict of str to Tensor
        The result of `score_model`; empty if the method has none.
    """

    package: ClassVar[str | None] = None
    needs_gradients: ClassVar[bool] = False
    removes: ClassVar[frozenset[str]] = frozenset({"groups", "channels", "channels of experts"})
    compensates: ClassVar[bool] = False
    needs_dense: bool = False
    refit_epochs: int = 0

    def __init__(self, config: PruneConfig) -> None:
        self.config = config
        self.scores: dict[str, Tensor] = {}
        self.within: Mapping[tuple[int, str], Sequence[int]] = {}

    def excluded(self, sublayer: Sublayer) -> Tensor:
        """Units of a sublayer that must go, because `within` has others."""
        units = range(sublayer.num_units)
        left = self.within.get((sublayer.block, sublayer.kind), units)
        gone = sorted(set(units).difference(left))
        return torch.tensor(gone, dtype=torch.long, device=sublayer.weight.device)

    @property
    def scores_model(self) -> bool:
        """Whether the method scores the units of the whole model at once."""
        return type(self).score_model is not Method.score_model

    def extend_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Extend the config of the dense model before pruning, for example by biases."""
        return config

    def score_model(
        self, model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths]
    ) -> dict[str, Tensor]:
        """Score the units of all sublayers at once.

        Parameters
        ----------
        model : PreTrainedModel
            The dense model. It has weights only if the method needs gradients.
        samples_NT : Tensor
            int64, calibration tokens.
        widths : sequence of tuple of int
            Units that each block will keep.

        Returns
        -------
        dict
            scores_U, by the sublayer's name.
        """
        raise NotImplementedError

    def score_experts(self, experts: Experts, stream: Stream) -> Tensor:
        """Score whole experts, for methods that can remove them: scores_E.

        Parameters
        ----------
        experts : Experts
            The dense sublayer.
        stream : Stream
            The residual stream before it.
        """
        raise NotImplementedError

    @abstractmethod
    def decide(self, sublayer: Sublayer, width: Width, activations: Activations) -> Decision:
        """Select the units to keep, and compute their weights in the output projection.

        Parameters
        ----------
        sublayer : Sublayer
            The dense sublayer, with its weights.
        width : Width
            Units to keep.
        activations : Activations
            Calibration statistics. The method may consume them (see `Activations.take_sums`).
        """


class ScoringMethod(Method):
    """A method that scores the units and removes those with the lowest scores.

    The kept weights are not updated.
    """

    def score(self, sublayer: Sublayer, activations: Activations) -> Tensor:
        """Score the units of a sublayer: scores_U."""
        return self.scores[sublayer.name]

    def decide(self, sublayer: Sublayer, width: Width, activations: Activations) -> Decision:
        """Keep the units with the highest scores, see `Method.decide`."""
        assert isinstance(width, int)  # only measured widths may be of another kind
        scores_U = self.score(sublayer, activations)
        scores_U = scores_U.index_fill(0, self.excluded(sublayer).to(scores_U.device), -torch.inf)
        kept = Kept(scores_U.argsort(descending=True, stable=True)[:width].sort().values)
        hessian_II, mean_I = activations.hessian_II, activations.mean_I
        weight_OI = sublayer.output.weight.to(mean_I.device).to(mean_I.dtype)
        columns_K = sublayer.columns(kept).to(mean_I.device)
        removed_R = torch.ones_like(mean_I, dtype=torch.bool).index_fill_(0, columns_K, False)
        weight_OR, lost_RR = weight_OI[:, removed_R], hessian_II[removed_R][:, removed_R]
        bias_O = self.replace(sublayer, weight_OR, mean_I[removed_R], lost_RR)
        error = output_power(weight_OR, lost_RR)
        power = output_power(weight_OI, hessian_II)
        return Decision(kept, weight_OI[:, columns_K], error, power, bias_O)

    def replace(
        self, sublayer: Sublayer, weight_OR: Tensor, mean_R: Tensor, lost_RR: Tensor
    ) -> Tensor | None:
        """Compute a bias_O for the removed columns; subtract the part it covers from `lost_RR`."""
        return None


def unit_sums(sublayer: Sublayer, score: Callable[[Any], Tensor]) -> Tensor:
    """Sum the scores of a sublayer's single weights over each unit.

    Parameters
    ----------
    sublayer : Sublayer
        A sublayer of a live model.
    score : callable
        Returns scores for the weight of a linear layer, in the weight's shape.

    Returns
    -------
    Tensor
        scores_U, from the rows of the input projections and the columns of the output projection.
    """
    sums_U = []
    for name in (*sublayer.spec.inputs, sublayer.spec.output):
        layer: Any = sublayer.module.get_submodule(name)
        scores_OI = score(layer)
        if isinstance(getattr(layer, "base_layer", layer), Conv1D):
            scores_OI = scores_OI.T
        is_output = name == sublayer.spec.output
        sums = scores_OI.sum(dim=0 if is_output else 1).cpu().double()
        for _, rows in sublayer.rows(name, len(sums)):
            if len(rows) >= sublayer.num_units:  # else the units share them
                sums_U.append(sums[rows.view(sublayer.num_units, -1)].sum(dim=1))
    return torch.stack(sums_U).sum(dim=0)


def sublayers_of(model: PreTrainedModel) -> list[Sublayer]:
    """List the sublayers of all blocks."""
    return [sublayer for block in bind(model) for sublayer in block.sublayers]


# Of LoRAPrune and Compresso.
LORA_RANK, LORA_ALPHA = 8, 16


def add_adapters(model: PreTrainedModel, seed: int) -> list[Tensor]:
    """Add LoRA adapters to all projections, and return their weights; no other has a gradient."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=linears_of(model))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def scaled_units(input_NTI: Tensor, factor_U: Tensor) -> Tensor:
    """Multiply the inputs of an output projection by a factor for each unit."""
    factor_U1 = factor_U.to(input_NTI)[:, None]
    return (input_NTI.unflatten(-1, (len(factor_U), -1)) * factor_U1).flatten(-2)


def add_gradient(model: PreTrainedModel, sample_T: Tensor) -> None:
    """Add the gradient of the loss on one sample; only its activations are in memory."""
    sample_NT = sample_T[None].to(model.device)
    model(sample_NT, labels=sample_NT, use_cache=False).loss.backward()
