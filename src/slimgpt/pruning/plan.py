"""The plan of a run: the widths of every block, with the resulting ratios and parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.allocation.reallocation import samples_needed
from slimgpt.allocation.schedule import Schedule, WidthRules, given_widths, scheduled_widths
from slimgpt.allocation.shapes import BlockShape, BlockWidths, removed_params
from slimgpt.checkpoint.writer import pruned_config, uniform_group_counts
from slimgpt.config import PruneConfig
from slimgpt.methods.registry import make_method
from slimgpt.models.blocks import bind
from slimgpt.models.layout import family_in
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import find_model


@dataclass(frozen=True)
class PrunePlan:
    """Widths of every block, with the resulting ratios and parameters.

    Attributes
    ----------
    shapes : tuple of BlockShape
        The prunable units of each block.
    widths : tuple of tuple of int
        Units that each block keeps, by sublayer: key/value groups and FFN channels.
    layer_ratios : tuple of float
        Fraction of its prunable parameters that each block loses.
    target_ratio, block_ratio : float
        Removed fraction of the prunable block parameters: the requested and the planned one.
    total_ratio : float
        Removed fraction of all parameters, embeddings included.
    params_before, params_after : int
        All parameters of the dense and of the pruned model.
    is_measured : bool
        Whether a sensitivity pass reallocates units. The widths of a plan are then its start.
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
    """Compute the widths of a pruned model from its config, without reading weights.

    With measured widths, the run starts from these. It may redistribute units among sublayers; the
    total number of removed parameters does not change.

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
    base_config = load_config(find_model(model))
    widths = initial_widths(shapes_of(base_config), base_config, config)
    return make_plan(base_config, config, widths)


def initial_widths(
    shapes: Sequence[BlockShape], base_config: PreTrainedConfig, config: PruneConfig
) -> list[BlockWidths]:
    """Compute the widths from the given layer ratios or the schedule, without measurement.

    Raises
    ------
    ConfigError
        If a block would lose more than it can.
    """
    share = config.attention_share
    rules = WidthRules(
        config.multiple_of,
        uniform_group_counts(base_config) if config.uniform else None,
        attention_share(base_config) if share is None else share,
        config.expert_units,
    )
    if config.layer_ratios:
        return given_widths(shapes, config.layer_ratios, rules)
    schedule = Schedule(config.ratio, config.schedule, config.min_ratio)
    return scheduled_widths(shapes, schedule, rules)


def make_plan(
    base_config: PreTrainedConfig, config: PruneConfig, widths: Sequence[BlockWidths]
) -> PrunePlan:
    """Compute the ratios and parameter counts that follow from the widths."""
    skeleton = build_skeleton(base_config)
    shapes = [block.shape for block in bind(skeleton)]
    given = sum(r * s.params for r, s in zip(config.layer_ratios, shapes, strict=False))
    prunable = sum(shape.params for shape in shapes)
    seqlen = min(config.seqlen, base_config.get_text_config().max_position_embeddings)
    removed = [removed_params(s, w) for s, w in zip(shapes, widths, strict=True)]
    extended = make_method(config).extend_config(base_config)
    result = build_skeleton(pruned_config(extended, widths, config.uniform))
    before, after = skeleton.num_parameters(), result.num_parameters()
    return PrunePlan(
        shapes=tuple(shapes),
        widths=tuple(widths),
        layer_ratios=tuple(r / s.params for r, s in zip(removed, shapes, strict=True)),
        target_ratio=given / prunable if config.layer_ratios else config.ratio,
        block_ratio=sum(removed) / prunable,
        total_ratio=1 - after / before,
        params_before=before,
        params_after=after,
        is_measured=is_measured(shapes, widths, seqlen, config),
    )


def is_measured(
    shapes: Sequence[BlockShape], widths: Sequence[BlockWidths], seqlen: int, config: PruneConfig
) -> bool:
    """Whether a sensitivity pass runs: requested, something to remove, and enough samples.

    It does not measure experts.
    """
    if any(sub.kind == "experts" for shape in shapes for sub in shape.sublayers):
        return False
    removed = any(removed_params(s, w) for s, w in zip(shapes, widths, strict=True))
    needed = samples_needed(shapes, seqlen)
    return config.widths == "measured" and removed and config.nsamples >= needed


def shapes_of(base_config: PreTrainedConfig) -> list[BlockShape]:
    """List the prunable units of each block of a model."""
    return [block.shape for block in bind(build_skeleton(base_config))]


def attention_share(config: Any) -> float:
    """Attention's pruning ratio relative to its block's: (1 + 1/g)/2.

    Here g query heads share a kv head. A query head with its share of a kv head has 2 + 2/g
    matrices of head_dim × hidden_size; in MHA (g = 1) it has 4. Assume that the errors of attention
    and FFN grow with the squares of their ratios. Then, for a fixed number of removed parameters,
    the sum of the errors is smallest when attention's ratio is proportional to the parameters that
    a head frees: (2 + 2/g)/4 of its ratio in MHA, which is 1. A query head of a single group frees
    no part of its kv head: 2/4.
    """
    keys = family_in(config).widths("attention")
    if not keys:
        return 1.0
    first = config.get_text_config().per_layer_config[0]
    groups, heads = (getattr(first, key) for key in keys)
    return (1 + groups / heads) / 2 if groups > 1 else 0.5
