"""Prune a sublayer with experts: choose the experts, route the tokens again, solve each expert.

The output of the sublayer is a sum over the experts of each token: y = Σ g_e W_e a_e, with the
factor g_e of the router. So expert e is a linear layer with the input x = g_e a_e on its tokens and
zero on all others, and H_e = E[x xᵀ] over all tokens of the layer makes the errors of experts
comparable. The experts are solved one after the other. Each takes over what the sublayer still
lacks, r = t − y, on its tokens: the target of its output projection is W_e x + r, and what then
remains of r goes on to the next (block coordinate descent on the least squares of all experts).

Shape suffixes: ``T`` tokens, ``C`` hidden size, ``I`` channels of an expert, ``K`` kept channels,
``E`` experts.
"""

from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import Tensor

from slimgpt.allocation.shapes import Width
from slimgpt.calibration.activations import (
    Activations,
    Stream,
    Sums,
    output_input,
    targets,
)
from slimgpt.errors import numerical_errors_at
from slimgpt.methods.base import Decision, Method
from slimgpt.models.experts import Experts, Routing
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import Kept
from slimgpt.pruning.decisions import RoutingChange, SublayerPlan
from slimgpt.runtime.distributed import (
    all_reduce,
    broadcast,
    broadcast_tensor,
    is_main,
    shard_batches,
)

# An expert with fewer tokens for each of its channels borrows from other tokens.
TOKENS_PER_CHANNEL = 2


@torch.no_grad()
def prune_experts(
    experts: Experts, width: Width, stream: Stream, method: Method
) -> tuple[SublayerPlan, Tensor]:
    """Choose the experts and channels to keep, and compute the new output projections.

    Parameters
    ----------
    experts : Experts
        The dense sublayer; it is not changed.
    width : Width
        Experts to keep, or experts and channels of each.
    stream : Stream
        The residual stream before the sublayer. The dense model's stream moves on past it.
    method : Method
        Scores the experts, and decides about each expert as about an FFN.

    Returns
    -------
    tuple
        The plan, and the output projections (kept experts, C, kept channels).
    """
    num_experts, num_channels = (width, experts.num_parts) if isinstance(width, int) else width
    device = experts.weight.device
    units_E = torch.arange(experts.num_units, device=device)
    if num_experts < experts.num_units:
        scores_E = method.score_experts(experts, stream)
        units_E = _best(scores_E, num_experts, experts.num_groups).to(device)
        units_E = broadcast_tensor(units_E)
        experts = replace(experts, routed_E=units_E)
    solver = _Solver(experts, stream, method)
    weight_ECK = experts.empty(num_experts, experts.weights.down_proj.shape[1], num_channels)
    channels, dampings = [], []
    for expert, new_CK in zip(units_E.tolist(), weight_ECK, strict=True):
        decision = solver.solve(expert, num_channels)
        new_CK.copy_(decision.weight_OK)
        channels.append(decision.kept.units.cpu() + expert * experts.num_parts)
        dampings.append(decision.damping)
    error = solver.error()
    plan = SublayerPlan(
        experts.kind,
        tuple(units_E.tolist()),
        error,
        error / solver.power if solver.power else 0.0,
        max(dampings),
        () if num_channels == experts.num_parts else tuple(torch.cat(channels).tolist()),
        routing=solver.change(),
    )
    return plan, weight_ECK


def _best(scores_E: Tensor, number: int, num_groups: int) -> Tensor:
    """The experts with the highest scores, equally many of each group."""
    ranked = scores_E.view(num_groups, -1).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(0, len(scores_E), len(scores_E) // num_groups, device=scores_E.device)
    return (ranked[:, : number // num_groups] + first[:, None]).flatten().sort().values


def _sum_of_squares(values: Tensor) -> Tensor:
    """Sum in float64, on the CPU."""
    return values.flatten(1).square().sum(dim=1).cpu().double().sum()


@dataclass
class _Solver:
    """Solves the experts of a sublayer one after the other.

    Attributes
    ----------
    experts : Experts
        The sublayer, with the routing over the kept experts.
    stream, method
        See `prune_experts`.
    power : float
        E‖y‖² of the dense sublayer.
    """

    experts: Experts
    stream: Stream
    method: Method
    power: float = field(init=False)
    _few: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Route all tokens, and subtract the output from the target."""
        experts, method, powers = self.experts, self.method, []
        dense = replace(experts, routed_E=None)
        alpha = method.config.correction if method.needs_dense else 0.0
        routings, before, rests = [], [], []
        for input_NTC, target_NTC in zip_longest(self.stream.inputs(), targets(dense, self.stream)):
            normed_TC = self._normed(input_NTC.flatten(0, 1))
            others_TC = experts.others(normed_TC)
            before.append(dense.route(normed_TC))
            dense_TC = dense.combine(normed_TC, before[-1])
            powers.append(_sum_of_squares(dense_TC + others_TC))
            routing, rest_TC = before[-1], torch.zeros_like(dense_TC)
            if experts.routed_E is not None:
                routing = experts.route(normed_TC)
                rest_TC = dense_TC - experts.combine(normed_TC, routing)
            routings.append(routing)
            if target_NTC is not None:
                target_TC = target_NTC.flatten(0, 1).to(dense_TC)
                rest_TC.add_(target_TC - dense_TC - others_TC, alpha=alpha)
            rests.append(rest_TC)
        self._rest_TC = torch.cat(rests)
        self._routing = Routing(*map(torch.cat, zip(*routings, strict=True)))
        self._before = Routing(*map(torch.cat, zip(*before, strict=True)))
        num_batches = int(all_reduce(torch.tensor(len(rests))))
        self._batch_size = len(rests[0])
        self._first = shard_batches(num_batches).start * self._batch_size  # token of this process
        power = torch.stack(powers).sum()
        self._num_tokens = all_reduce(torch.full_like(power, len(self._rest_TC)))
        self.power = float(all_reduce(power) / self._num_tokens)

    def error(self) -> float:
        """E‖t − y‖²; without a correction, the mean squared change of the output."""
        return float(all_reduce(_sum_of_squares(self._rest_TC)) / self._num_tokens)

    def solve(self, index: int, num_channels: int) -> Decision:
        """Decide about one expert, and subtract from the rest what it takes over."""
        expert, compensates = self.experts.expert(index), self.method.compensates
        weight_OI = expert.output.weight
        if num_channels == self.experts.num_parts and not compensates:
            return Decision(Kept(torch.arange(num_channels)), weight_OI, 0.0, 0.0)
        tokens_T, factor_T1 = self._routing.tokens_of(index)
        sums, inputs = Sums(expert.output, has_target=compensates), []
        batches = self._batches(tokens_T)
        for rows_T, factors_T1 in zip(batches, factor_T1.split([*map(len, batches)]), strict=True):
            inputs.append(self._input(expert, rows_T) * factors_T1)
            sums.add(inputs[-1], self._rest_TC[rows_T].float() if compensates else None)
        activations = sums.average([], self._num_tokens)
        num_own = int(sums.num_tokens)
        if num_own < TOKENS_PER_CHANNEL * self.experts.num_parts:
            self._few[index] = num_own
            self._borrow(expert, activations, factor_T1, num_own)
        if activations.cross_OI is not None:
            hessian_II = activations.hessian_II
            activations.cross_OI += weight_OI.to(hessian_II.device).double() @ hessian_II
            activations.correction = 1.0  # the target has the fraction that is to be corrected
        decision = self._decide(expert, num_channels, activations)
        kept_K, new_OK = decision.kept.units, decision.weight_OK
        for rows_T, input_TI in zip(batches, inputs, strict=True):
            before_TO = input_TI @ weight_OI.to(input_TI).T
            change_TO = before_TO - input_TI[:, kept_K] @ new_OK.to(input_TI).T
            self._rest_TC.index_add_(0, rows_T, change_TO.to(self._rest_TC))
        return decision

    def change(self) -> RoutingChange:
        """Compare the routing with that of the dense sublayer."""
        num_experts, needed = self.experts.num_units, TOKENS_PER_CHANNEL * self.experts.num_parts
        before_E, after_E = (
            all_reduce(torch.bincount(r.index_TK.flatten().cpu(), minlength=num_experts).double())
            for r in (self._before, self._routing)
        )
        kept_E = self.experts.routed_E
        left_E = (
            before_E
            if kept_E is None
            else torch.zeros_like(before_E).index_copy_(0, kept_E.cpu(), before_E[kept_E.cpu()])
        )
        seen = [number for number in self._few.values() if number]
        shift = (left_E / left_E.sum().clamp(min=1) - after_E / after_E.sum()).abs().sum() / 2
        return RoutingChange(
            rerouted=float(1 - left_E.sum() / before_E.sum()),
            load_shift=float(shift),
            few_tokens=tuple(self._few),
            samples_factor=needed / min(seen) if seen else 1.0,
        )

    def _batches(self, rows_T: Tensor) -> tuple[Tensor, ...]:
        """Split sorted tokens like the stream, so that sums do not depend on the processes."""
        return rows_T.split(torch.bincount(rows_T // self._batch_size).tolist())

    def _normed(self, rows_TC: Tensor) -> Tensor:
        return self.experts.normed(rows_TC.to(self.experts.weight.device))

    def _input(self, expert: Sublayer, rows_T: Tensor) -> Tensor:
        """Input of the output projection of an expert, float32 at least."""
        source_TC = self.stream.source.flatten(0, 1)
        input_TI = output_input(expert, self._normed(source_TC[rows_T.to(source_TC.device)]))
        return input_TI.to(torch.promote_types(input_TI.dtype, torch.float32))

    def _borrow(
        self, expert: Sublayer, activations: Activations, factor_T1: Tensor, num_own: int
    ) -> None:
        """Shrink the statistics of an expert with few tokens toward those of all tokens.

        On the other tokens its target is its own output.
        """
        needed = TOKENS_PER_CHANNEL * expert.num_units
        own, share = num_own / needed, max(num_own, 1) / float(self._num_tokens)
        square = float(all_reduce(_sum_of_squares(factor_T1))) / max(num_own, 1)
        square = square or 1 / self._routing.index_TK.shape[1] ** 2
        num_local, step = len(self._rest_TC), max(int(self._num_tokens) // needed, 1)
        sums = Sums(expert.output, has_target=False)
        rows_T = torch.arange(-self._first % step, num_local, step)
        for batch_T in self._batches(rows_T):
            sums.add(self._input(expert, batch_T))
        borrowed = sums.average([])
        weight = (1 - own) * share * square
        activations.hessian_II.mul_(own).add_(borrowed.hessian_II, alpha=weight)
        activations.mean_I.mul_(own).add_(borrowed.mean_I, alpha=weight / square**0.5)
        if activations.cross_OI is not None:
            activations.cross_OI.mul_(own)

    def _decide(self, expert: Sublayer, num_channels: int, activations: Activations) -> Decision:
        """Let the main process decide."""
        decision, weight_OI = None, expert.output.weight
        weight_OK = weight_OI.new_empty(len(weight_OI), num_channels)
        if is_main():
            index = expert.name.rpartition(".")[2]
            with numerical_errors_at(f"block {expert.block}, expert {index}"):
                decision = self.method.decide(expert, num_channels, activations)
            weight_OK.copy_(decision.weight_OK)
            decision = decision._replace(weight_OK=None, kept=Kept(decision.kept.units.cpu()))
        decision = broadcast(decision)
        kept = Kept(decision.kept.units.to(weight_OI.device))
        return decision._replace(weight_OK=broadcast_tensor(weight_OK), kept=kept)
