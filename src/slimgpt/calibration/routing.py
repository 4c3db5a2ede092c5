"""Scores of whole experts: what their outputs are worth to the sublayer.

Shape suffixes: ``T`` tokens, ``C`` hidden size, ``E`` experts, ``K`` experts of a token, ``P``
pairs of a token and an expert.

References
----------
Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
arXiv 2510.13999.
"""

from dataclasses import replace

import torch
from torch import Tensor

from slimgpt.calibration.activations import Stream
from slimgpt.models.experts import Experts, Routing
from slimgpt.runtime.distributed import all_reduce


@torch.no_grad()
def rerouting_errors(experts: Experts, stream: Stream) -> Tensor:
    """Squared change of the output if one expert is left out and its tokens go to the others.

    The tokens are routed as the stock class does without this expert. The error of an expert
    without tokens counts as 0, although where the router's weights are not normalised, those of all
    tokens grow a little.

    Returns
    -------
    Tensor
        errors_E, float64, summed over the tokens of all processes.
    """
    num_experts = experts.num_units
    errors_E, numbers_E = torch.zeros(2, num_experts, dtype=torch.float64)
    for input_NTC in stream.inputs():
        normed_TC = experts.normed(input_NTC.flatten(0, 1).to(experts.weight.device))
        dense = experts.route(normed_TC)
        numbers_E += torch.bincount(dense.index_TK.flatten().cpu(), minlength=num_experts)
        is_used_TE = torch.zeros(len(normed_TC), num_experts, dtype=torch.bool)
        is_used_TE = is_used_TE.to(normed_TC.device).scatter_(1, dense.index_TK, True)
        rerouted = []
        for index in range(num_experts):
            rest_E = torch.tensor([e for e in range(num_experts) if e != index])
            without = replace(experts, routed_E=rest_E.to(normed_TC.device)).route(normed_TC)
            # Where the weights are not normalised, those of all tokens change.
            changes_TK = (without.index_TK != dense.index_TK) | (
                without.weight_TK != dense.weight_TK
            )
            tokens_T = changes_TK.any(dim=1).nonzero()[:, 0]
            after = Routing(without.index_TK[tokens_T], without.weight_TK[tokens_T])
            rerouted.append((tokens_T, after))
            is_used_TE[tokens_T[:, None], after.index_TK] = True
        outputs_PC, pair_TE = _pair_outputs(experts, normed_TC, is_used_TE)

        def mixed(tokens_T: Tensor, routing: Routing) -> Tensor:
            pairs_TK = pair_TE[tokens_T[:, None], routing.index_TK]  # noqa: B023
            return (outputs_PC[pairs_TK] * routing.weight_TK[..., None]).sum(dim=1)  # noqa: B023

        for index, (tokens_T, after) in enumerate(rerouted):
            before = Routing(dense.index_TK[tokens_T], dense.weight_TK[tokens_T])
            change_TC = mixed(tokens_T, after) - mixed(tokens_T, before)
            errors_E[index] += float(change_TC.square().sum(dim=1).cpu().double().sum())
    return all_reduce(errors_E).where(all_reduce(numbers_E) > 0, 0.0)


@torch.no_grad()
def weighted_norms(experts: Experts, stream: Stream) -> Tensor:
    """Mean of router weight times norm of the output over the tokens of an expert (REAP, eq. 9).

    Returns
    -------
    Tensor
        scores_E, float64; 0 for an expert without tokens.
    """
    sums_E, numbers_E = torch.zeros(2, experts.num_units, dtype=torch.float64)
    for input_NTC in stream.inputs():
        normed_TC = experts.normed(input_NTC.flatten(0, 1).to(experts.weight.device))
        routing = experts.route(normed_TC)
        for index in routing.index_TK.unique().tolist():
            tokens_T, factor_T1 = routing.tokens_of(index)
            norms_T = experts.output_of(index, normed_TC[tokens_T]).float().norm(dim=1)
            sums_E[index] += float((factor_T1[:, 0] * norms_T).cpu().double().sum())
            numbers_E[index] += len(tokens_T)
    return all_reduce(sums_E) / all_reduce(numbers_E).clamp(min=1)


def _pair_outputs(experts: Experts, normed_TC: Tensor, is_used_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the pairs of tokens and experts that are used, and the place of each pair."""
    outputs = [
        experts.output_of(index, normed_TC[is_used_TE[:, index]]).float()
        for index in range(experts.num_units)
    ]
    pair_ET = is_used_TE.T.flatten().cumsum(dim=0).view_as(is_used_TE.T) - 1
    return torch.cat(outputs), pair_ET.T
