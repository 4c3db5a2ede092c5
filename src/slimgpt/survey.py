"""Which sublayers matter most to the output of the model, and the widths that follow from it."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from slimgpt.calibrate import fast_products
from slimgpt.config import PruneConfig
from slimgpt.distributed import from_main, is_main
from slimgpt.errors import NumericalError
from slimgpt.families import bind
from slimgpt.footprint import Footprint
from slimgpt.model import build_skeleton
from slimgpt.run import WIDTHS_FILE, Run, write_atomically, writing
from slimgpt.schedule import BlockShape, BlockWidths, move_units
from slimgpt.shrink import unit_columns
from slimgpt.streaming import StreamedModel
from slimgpt.sweep import read_plan, sweep
from slimgpt.weights import read_tensor

log = logging.getLogger(__name__)

SURVEY_SHARE = 4  # one sample in so many; half as many others show what errors cost
PROBE_TOKENS = 512  # of each of these


def samples_needed(shapes: Sequence[BlockShape], seqlen: int) -> int:
    """Least number of calibration samples of which a survey gets as many tokens as channels.

    With fewer tokens, what stays of an FFN fits them whatever goes: its errors are near 0.
    """
    num_channels = max(shape.num_channels for shape in shapes)
    return SURVEY_SHARE * (math.ceil(num_channels / seqlen) - 1) + 1


def measured_widths(
    run: Run,
    streamed: StreamedModel,
    samples_NT: Tensor,
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
    config: PruneConfig,
    footprint: Footprint,
) -> list[BlockWidths]:
    """Keep the units that matter most to the model's output, whatever sublayer they are in.

    The survey prunes to the given widths with a part of the samples. It measures for each sublayer
    what its error costs the output there (`price_changes`), and what the error would be at other
    widths. A sublayer that the given widths leave whole stays so.

    Parameters
    ----------
    run : Run
        Where an interrupted survey is found again, and its result.
    streamed : StreamedModel
        The model before pruning.
    samples_NT : Tensor
        int64, the calibration tokens of all processes.
    shapes, widths
        The blocks, and the widths to begin with, at which something is removed.
    config, footprint
        See `slimgpt.sweep.sweep`.

    Returns
    -------
    list of BlockWidths
        With as many parameters in all.

    Raises
    ------
    NumericalError
        If gradients overflow.
    """
    file = run.state / WIDTHS_FILE
    if not from_main(file.exists()):
        chosen_NT = samples_NT[::SURVEY_SHARE]
        log.info("survey, with %d of the samples, of what the layers cost", len(chosen_NT))
        skeleton = build_skeleton(streamed.skeleton.config, streamed.weights.dtype)
        surveyed = StreamedModel(skeleton, streamed.weights, streamed.device)
        sweep(surveyed, chosen_NT, widths, config, footprint, run, stage="survey")
        if is_main():
            moved = _moved(run, streamed, samples_NT, shapes, widths, config.multiple_of)
            with writing(run.output):
                write_atomically(file, json.dumps([asdict(width) for width in moved]))
                for index in range(len(moved)):
                    run.block_file(index, "survey").unlink()
    values = from_main(is_main() and json.loads(file.read_text(encoding="utf-8")))
    return [BlockWidths(**value) for value in values]


def _moved(
    run: Run,
    streamed: StreamedModel,
    samples_NT: Tensor,
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
    multiple_of: int,
) -> list[BlockWidths]:
    changed, plans = {}, []
    for block in bind(streamed.skeleton):
        file = run.block_file(block.index, "survey")
        plan = read_plan(file)
        for sublayer, decided in zip(block.sublayers, (plan.attention, plan.ffn), strict=True):
            plans.append(decided)
            if decided.errors:
                name = f"{block.output_name(sublayer)}.weight"
                weight_OK = read_tensor(file, name)
                columns_K = unit_columns(torch.tensor(decided.keep), sublayer.unit_size)
                weight_OI = weight_OK.new_zeros(sublayer.output.weight.shape)
                changed[name] = weight_OI.index_copy_(1, columns_K, weight_OK)
    # Other samples than those of the survey, if there are others.
    probes = samples_NT[1 % len(samples_NT) :: 2 * SURVEY_SHARE, :PROBE_TOKENS]
    with streamed.whole() as model, fast_products(next(model.parameters())):
        effects = iter(price_changes(model, changed, probes))
    costs = [next(effects) if plan.errors else 0.0 for plan in plans]
    if not all(map(math.isfinite, costs)):
        raise NumericalError(
            "the gradients of the survey overflow",
            hint="use --dtype float32 or bfloat16, or --widths scheduled",
        )
    # A cost near or below zero is noise, and no reason to remove all.
    least = [sum(costs[kind::2]) / len(shapes) / 10 for kind in (0, 1)] * len(shapes)
    prices = [
        max(cost, floor) / plan.error if plan.error else 0.0
        for cost, floor, plan in zip(costs, least, plans, strict=True)
    ]
    return move_units(shapes, widths, [plan.errors for plan in plans], prices, multiple_of)


def price_changes(
    model: PreTrainedModel, changed: Mapping[str, Tensor], samples_NT: Tensor
) -> list[float]:
    """By how much the divergence from the model falls, to first order, as a change is undone.

    Let W + ΔW be a changed weight and G the gradient, for it, of KL(model ‖ changed model) with all
    changes made. Then it is tr(Gᵀ ΔW): the derivative for a factor of ΔW, at 1.

    Parameters
    ----------
    model : PreTrainedModel
        The model before any change, with its weights.
    changed : mapping of str to Tensor
        Weights that change, by their names, in their new values.
    samples_NT : Tensor
        int64, tokens to run over, best others than the changes were fitted to.

    Returns
    -------
    list of float
        For each change, in nats per token.
    """
    model.requires_grad_(False)
    changed = {n: weight.to(model.device).requires_grad_() for n, weight in changed.items()}
    totals = torch.zeros(len(changed), dtype=torch.float64)
    for sample_T in samples_NT.to(model.device):
        arguments = {"input_ids": sample_T[None], "use_cache": False}
        with torch.no_grad():
            dense_TV = log_softmax(model(**arguments).logits[0].float(), dim=-1)
        with torch.enable_grad():
            logits_TV = functional_call(model, changed, kwargs=arguments).logits[0]
            divergence = kl_div(
                log_softmax(logits_TV.float(), dim=-1), dense_TV, reduction="sum", log_target=True
            )
        gradients = torch.autograd.grad(divergence, list(changed.values()))
        for index, (name, weight) in enumerate(changed.items()):
            change = weight.detach().float() - model.get_parameter(name).float()
            totals[index] += (gradients[index].float() * change).sum().cpu()
    return (totals / samples_NT.numel()).tolist()
