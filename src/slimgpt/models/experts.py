"""Mixture-of-experts sublayers: a router, and experts of which each token uses a few.

Shape suffixes: ``T`` tokens, ``C`` hidden size, ``E`` experts, ``K`` experts of a token.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimgpt.allocation.shapes import SublayerShape
from slimgpt.models.device import autocast
from slimgpt.models.family import SublayerSpec
from slimgpt.models.mapping import allocate
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import Kept

# The projections of an expert have no biases in any of the families.
_EXPERT = SublayerSpec(
    kind="ffn",
    module="",
    inputs={"gate_proj": ("channel",), "up_proj": ("channel",)},
    output="down_proj",
    widths={"channel": "channels"},
    bias=False,
)

_CORRECTION_BIAS = "e_score_correction_bias"  # of the routers that have one


class Routing(NamedTuple):
    """The experts that each token uses.

    Attributes
    ----------
    index_TK : Tensor
        int64, their indices.
    weight_TK : Tensor
        Factors of their outputs.
    """

    index_TK: Tensor
    weight_TK: Tensor

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that use an expert, and the factors (tokens, 1) of its output there."""
        tokens, places = torch.where(self.index_TK == expert)
        return tokens, self.weight_TK[tokens, places, None]


@dataclass(frozen=True)
class Experts(Sublayer):
    """A sublayer with experts. Its units are the experts, the parts of a unit their channels.

    Attributes
    ----------
    routed_E : Tensor or None
        int64, sorted: tokens are routed as if there were only these experts.
    directory : Path or None
        If given, the weights of the experts are in memory-mapped files there.
    """

    routed_E: Tensor | None = None
    directory: Path | None = None

    @property
    def router(self) -> Any:
        """Chooses the experts of each token."""
        return self.module.get_submodule(self.spec.router)

    @property
    def weights(self) -> Any:
        """Has ``gate_up_proj`` (E, 2 · channels, C) and ``down_proj`` (E, C, channels)."""
        return self.module.get_submodule("experts")

    @property
    def weight(self) -> Tensor:
        """The weight of the router, for its device and type; mapped experts are on the CPU."""
        return self.router.weight

    @property
    def num_parts(self) -> int:
        """Channels of an expert."""
        return self.counts["channel"]

    @property
    def num_groups(self) -> int:
        """Groups of consecutive experts, of which the router first chooses some; usually one."""
        return getattr(self.router, "num_group", None) or 1

    @property
    def shape(self) -> SublayerShape:
        """The prunable units."""
        per_channel = 3 * self.weights.gate_up_proj.shape[2]
        loses_channels = "channel" in self.spec.widths
        return SublayerShape(
            self.kind,
            self.num_units,
            unit_params=self.num_parts * per_channel + self.router.weight.shape[1],
            is_fixed=not self.spec.widths,
            parts=self.num_parts if loses_channels else 1,
            part_params=per_channel if loses_channels else 0,
            fewest=self._fewest,
            multiple=self.num_groups,
        )

    @property
    def _fewest(self) -> int:
        """So many experts are left, so that the router finds enough in the groups it chooses."""
        per_group = -(-self.router.top_k // (getattr(self.router, "topk_group", None) or 1))
        if hasattr(self.router, "num_group"):  # the two best experts of a group decide about it
            per_group = max(per_group, 2)
        return min(self.num_groups * per_group, self.num_units)

    def expert(self, index: int) -> Sublayer:
        """One expert as an FFN; its weights may share their memory with those of the experts."""
        module = _Expert(self.weights, index, self.weight.device)
        name = f"{self.name}.experts.{index}"
        counts = {"channel": self.num_parts}
        return Sublayer(self.block, name, _EXPERT, None, None, module, counts, 1.0)

    def route(self, normed_TC: Tensor) -> Routing:
        """Choose the experts of each token, as the stock class does."""
        if self.routed_E is None:
            _, weight_TK, index_TK = self.router(normed_TC)
            return Routing(index_TK, weight_TK)
        router = copy.deepcopy(self.router)
        if self.num_groups == 1:
            slice_router(router, self.routed_E)
            _, weight_TK, index_TK = router(normed_TC)
            return Routing(self.routed_E[index_TK], weight_TK)
        # The experts stay in their groups, but the others are never chosen.
        never_E = torch.full_like(router.weight[:, 0], -torch.inf).index_fill_(0, self.routed_E, 0)
        if hasattr(router, _CORRECTION_BIAS):
            getattr(router, _CORRECTION_BIAS).add_(never_E)
        else:  # a further input, which is one
            router.weight = nn.Parameter(torch.cat([router.weight, never_E[:, None]], dim=1), False)
            router.hidden_dim += 1
            normed_TC = nn.functional.pad(normed_TC, (0, 1), value=1.0)
        _, weight_TK, index_TK = router(normed_TC)
        return Routing(index_TK, weight_TK)

    def others(self, normed_TC: Tensor) -> Tensor:
        """What the sublayer computes beside the experts: zero, or the output of shared experts."""
        experts = self.weights
        self.module.set_submodule("experts", _NoExperts())
        try:
            return self.module(normed_TC[None])[0]
        finally:
            self.module.set_submodule("experts", experts)

    def combine(self, normed_TC: Tensor, routing: Routing) -> Tensor:
        """Sum the outputs of the experts of each token, in float32 at least."""
        dtype = torch.promote_types(normed_TC.dtype, torch.float32)
        sum_TC = torch.zeros_like(normed_TC, dtype=dtype)
        for index in routing.index_TK.unique().tolist():
            tokens_T, weight_T1 = routing.tokens_of(index)
            output_TC = self.output_of(index, normed_TC[tokens_T])
            sum_TC.index_add_(0, tokens_T, (output_TC * weight_T1).to(dtype))
        return sum_TC

    def output_of(self, index: int, normed_TC: Tensor) -> Tensor:
        """Output of one expert, without the factor of the router."""
        with autocast(self.weight):
            return self.expert(index).forward(normed_TC)

    def forward(self, normed: Tensor, kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """Run the sublayer, see `Sublayer.forward`."""
        with torch.autocast(normed.device.type, enabled=False):  # rounding would move tokens
            normed_TC = normed.reshape(-1, normed.shape[-1])
            routing, others_TC = self.route(normed_TC), self.others(normed_TC)
            sum_TC = self.combine(normed_TC, routing) + others_TC
        return sum_TC.to(normed.dtype).view_as(normed)

    def channels(self, kept: Kept) -> Tensor:
        """Channels that each of the kept experts keeps: int64, (kept experts, kept channels)."""
        if kept.parts is None:
            return torch.arange(self.num_parts, device=kept.units.device).expand(
                len(kept.units), -1
            )
        return kept.parts.view(len(kept.units), -1) - kept.units[:, None] * self.num_parts

    def kept_output(self, kept: Kept) -> Tensor:
        """The output projections of the kept units: (kept experts, C, kept channels)."""
        kept = kept.to(self.weights.down_proj.device)
        down_ECI, channels_EI = self.weights.down_proj[kept.units], self.channels(kept)
        return down_ECI.gather(2, channels_EI[:, None].expand(-1, down_ECI.shape[1], -1))

    def empty(self, *shape: int) -> Tensor:
        """New weights for the experts, where their weights are."""
        if self.directory is None:
            return self.weights.down_proj.new_empty(shape)
        return allocate(shape, self.weights.down_proj.dtype, self.directory)

    def slice(self, kept: Kept, down_proj: Tensor) -> None:
        """Slice to the kept experts and channels, in place.

        Parameters
        ----------
        kept : Kept
            The experts and, counted through all experts, the channels to keep.
        down_proj : Tensor
            (kept experts, C, kept channels), the new output projections.
        """
        weights, own = self.weights, kept.to(self.weights.gate_up_proj.device)
        channels_EI = self.channels(own)
        rows_EI = torch.cat([channels_EI, channels_EI + self.num_parts], dim=1)
        gate_up_ECC = self.empty(*rows_EI.shape, weights.gate_up_proj.shape[2])
        for new_CC, index, rows_I in zip(gate_up_ECC, own.units, rows_EI, strict=True):
            torch.index_select(weights.gate_up_proj[index], 0, rows_I, out=new_CC)
        weights.gate_up_proj = nn.Parameter(gate_up_ECC, requires_grad=False)
        weights.down_proj = nn.Parameter(down_proj.contiguous(), requires_grad=False)
        weights.num_experts, _, weights.intermediate_dim = down_proj.shape
        slice_router(self.router, kept.units.to(self.weight.device))


def slice_router(router: Any, kept_E: Tensor) -> None:
    """Remove the rows of other experts from a router, in place."""
    router.weight = nn.Parameter(router.weight[kept_E], requires_grad=False)
    router.num_experts = len(kept_E)
    if isinstance(router, nn.Linear):
        router.out_features = len(kept_E)
    if hasattr(router, _CORRECTION_BIAS):
        setattr(router, _CORRECTION_BIAS, getattr(router, _CORRECTION_BIAS)[kept_E])


class _Expert(nn.Module):
    """One of the experts."""

    def __init__(self, weights: Any, index: int, device: torch.device) -> None:
        super().__init__()
        gate, up = weights.gate_up_proj[index].chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": weights.down_proj[index]}
        for name, weight in parts.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
            self.add_module(name, layer)
        self.act_fn = weights.act_fn

    def forward(self, input_TC: Tensor) -> Tensor:
        """Run the gated FFN."""
        gated = self.act_fn(self.get_submodule("gate_proj")(input_TC))
        product = gated * self.get_submodule("up_proj")(input_TC)
        return self.get_submodule("down_proj")(product)


class _NoExperts(nn.Module):
    """Takes the place of the experts: their sum is zero."""

    def forward(self, hidden_TC: Tensor, *routing: Tensor) -> Tensor:
        """Ignore the input."""
        return torch.zeros_like(hidden_TC)
