"""The plan of a run: the widths of every block, and what they amount to."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.allocation.reallocation import samples_needed
from slimgpt.allocation.schedule import plan_widths
from slimgpt.allocation.shapes import BlockShape, BlockWidths, removed_params
from slimgpt.checkpoint.writer import pruned_config, uniform_group_counts
from slimgpt.config import PruneConfig
from slimgpt.methods.flap import with_biases
from slimgpt.models.family import bind, family_of
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import find_model

log = logging.getLogger(__name__)


def attention_share(config: Any) -> float:
    """Ratio of attention over that of its block at which a query head costs as in MHA.

    A query head with its share of a kv head has 2 + 2/g matrices of head_dim × hidden_size, where g
    query heads share a kv head, and 4 in MHA. If the errors of attention and FFN grow with the
    squares of their ratios, their sum is least for a given number of parameters where the ratio of
    attention is in proportion to what a head frees: (2 + 2/g)/4 of that in MHA, which is 1.
    """
    config = config.per_layer_config[0]
    kv_heads, heads = family_of(config.model_type).attention.widths
    return (1 + getattr(config, kv_heads) / getattr(config, heads)) / 2


@dataclass(frozen=True)
class PrunePlan:
    """Widths of every block and what they amount to.

    Attributes
    ----------
    shapes : tuple of BlockShape
        What could be removed from each block.
    widths : tuple of BlockWidths
        Key/value groups and FFN channels that each block keeps.
    layer_ratios : tuple of float
        Fraction of its prunable parameters that each block loses.
    target_ratio, block_ratio, total_ratio : float
        Fraction to remove of the prunable block parameters as asked for, as planned, and what
        that is of all parameters, embeddings included.
    params_before, params_after : int
        All parameters.
    is_measured : bool
        Whether a survey decides the widths; those of a plan are what it begins with.
    """

    shapes: tuple[BlockShape, ...]
    widths: tuple[BlockWidths, ...]
    layer_ratios: tuple[float, ...]
    target_ratio: float
    block_ratio: float
    total_ratio: float
    params_before: int
    params_after: int
    is_measured: bool


def plan(model: str, **options: Any) -> PrunePlan:
    """Work out the widths of a pruned model, without its weights.

    If the run measures the widths, these are the ones that it begins with; the sum of what they
    remove stays.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.
    **options
        The fields of `slimgpt.config.PruneConfig`.

    Raises
    ------
    SlimGPTError
        If an option is wrong, the model cannot be read or the ratio is infeasible.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.plan("smollm2-135m", ratio=0.5).params_after  # doctest: +SKIP
    81430848
    """
    config = PruneConfig.create(**options)
    return make_plan(load_config(find_model(model)), config)


def warn_of_few_samples(planned: PrunePlan, seqlen: int, config: PruneConfig) -> None:
    """Warn where there are too few samples to measure the widths."""
    if config.widths == "measured" and planned.block_ratio > 0 and not planned.is_measured:
        log.warning(
            "the widths stay as scheduled: to measure them takes %d samples of %d tokens at least, "
            "and there are %d",
            samples_needed(planned.shapes, seqlen),
            seqlen,
            config.nsamples,
        )


def initial_config(model_config: PreTrainedConfig, config: PruneConfig) -> PreTrainedConfig:
    """Config of the model that is pruned: the base, with what the method adds to it."""
    return with_biases(model_config) if config.method == "flap" else model_config


def make_plan(
    model_config: PreTrainedConfig,
    config: PruneConfig,
    widths: Sequence[BlockWidths] | None = None,
) -> PrunePlan:
    """Plan the widths of a run, or take those that were measured."""
    skeleton = build_skeleton(model_config)
    shapes = [block.shape for block in bind(skeleton)]
    uniform_groups = uniform_group_counts(model_config) if config.uniform else None
    share = config.attention_share
    widths = widths or plan_widths(
        shapes,
        config.ratio,
        config.schedule,
        config.min_ratio,
        config.multiple_of,
        uniform_groups,
        config.layer_ratios,
        attention_share(model_config) if share is None else share,
    )
    given = sum(r * s.params for r, s in zip(config.layer_ratios, shapes, strict=False))
    prunable = sum(shape.params for shape in shapes)
    removed = [removed_params(s, w) for s, w in zip(shapes, widths, strict=True)]
    product = pruned_config(initial_config(model_config, config), widths, config.uniform)
    before, after = (m.num_parameters() for m in (skeleton, build_skeleton(product)))
    seqlen = min(config.seqlen, model_config.max_position_embeddings)
    return PrunePlan(
        shapes=tuple(shapes),
        widths=tuple(widths),
        layer_ratios=tuple(r / s.params for r, s in zip(removed, shapes, strict=True)),
        target_ratio=given / prunable if config.layer_ratios else config.ratio,
        block_ratio=sum(removed) / prunable,
        total_ratio=1 - after / before,
        params_before=before,
        params_after=after,
        is_measured=config.widths == "measured"
        and sum(removed) > 0
        and config.nsamples >= samples_needed(shapes, seqlen),
    )
