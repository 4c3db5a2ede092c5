"""The plan of a run: the widths of every block, with the resulting ratios and parameters."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.allocation.reallocation import samples_needed
from slimgpt.allocation.schedule import Schedule, WidthRules, given_widths, scheduled_widths
from slimgpt.allocation.shapes import (
    BlockShape,
    BlockWidths,
    has_experts,
    is_dropped,
    removed_params,
    whole_widths,
)
from slimgpt.allocation.targets import Target, target_widths
from slimgpt.checkpoint.depth import first_droppable
from slimgpt.checkpoint.writer import is_plain, pruned_config, uniform_group_counts
from slimgpt.config import PruneConfig
from slimgpt.errors import ConfigError
from slimgpt.methods.registry import make_method
from slimgpt.models.blocks import bind
from slimgpt.models.layout import family_in
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import Source, find_model
from slimgpt.presentation import html
from slimgpt.presentation.tables import sizes, widths_table
from slimgpt.pruning.targets import find_target


@dataclass(frozen=True)
class ReachedTarget:
    """A target and what is reached: a size predicted from the widths, or that of written files.

    Attributes
    ----------
    option : str
        Name of the option.
    asked, reached : int or float
        Its value, and that of the plan, which is not larger.
    unit : str
        What is counted.
    """

    option: str
    asked: int | float
    reached: int | float
    unit: str


@dataclass(frozen=True)
class PrunePlan:
    """Widths of every block, with the resulting ratios and parameters.

    Attributes
    ----------
    shapes : tuple of BlockShape
        The prunable units of each block.
    widths : tuple of tuple of int
        Units that each block keeps, by sublayer: key/value groups and FFN channels. A block that
        keeps none is dropped.
    layer_ratios : tuple of float
        Fraction of its prunable parameters that each block loses.
    target_ratio, block_ratio : float
        Removed fraction of the prunable block parameters: the requested and the planned one, which
        are the same if a target is requested, or nothing but dropped layers.
    total_ratio : float
        Removed fraction of all parameters, embeddings included.
    params_before, params_after : int
        All parameters of the dense and of the pruned model.
    is_measured : bool
        Whether a sensitivity pass reallocates units. The widths of a plan are then its start.
    target : ReachedTarget or None
        The target, if one is requested.
    dropped : tuple of int
        Indices of the dropped layers, sorted. The run chooses them; `plan` assumes the last ones.
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
    target: ReachedTarget | None = None
    dropped: tuple[int, ...] = ()

    def html_parts(self) -> tuple[str, ...]:
        """What a notebook shows of the widths and ratios."""
        level = (f"all blocks: {self.block_ratio:.1%}", self.block_ratio)
        ratios = {"removed": self.layer_ratios}
        return (
            html.rows(sizes(self).items()),
            html.chart("Share removed from each block", "bars", ratios, level, percent=True),
            html.table("Widths of each block", widths_table(self)),
        )

    def _repr_html_(self) -> str:
        return html.page(*self.html_parts())


def plan(model: str, **options: Any) -> PrunePlan:
    """Compute the widths of a pruned model from its config, without reading weights.

    With measured widths, the run starts from these. It may redistribute units among sublayers; the
    total number of removed parameters does not change, and a target is met again. Layers to drop
    are assumed to be the last ones; where all layers are alike, only their place is open.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.
    **options
        The fields of `slimgpt.config.PruneConfig`.

    Raises
    ------
    SlimGPTError
        If an option is wrong, the model cannot be read, or the ratio or target is infeasible.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.plan("smollm2-135m", ratio=0.5).params_after  # doctest: +SKIP
    81430848
    """
    config = PruneConfig.create(**options)
    source = find_model(model)
    base_config = load_config(source)
    dropped = last_layers(base_config, config)
    target = target_of_kept(source, base_config, config, dropped)
    widths = initial_widths(shapes_of(base_config), base_config, config, target, dropped)
    return make_plan(base_config, config, widths, target)


def last_layers(base_config: PreTrainedConfig, config: PruneConfig) -> tuple[int, ...]:
    """As many of the last layers as are to be dropped, before it is known which.

    Raises
    ------
    ConfigError
        If the model has too few.
    """
    number, layers = config.drop_layers, base_config.get_text_config().num_hidden_layers
    if number > (most := layers - first_droppable(base_config)):
        raise ConfigError(
            f"drop_layers={number}, but of the {layers} layers at most {most} can be dropped",
            hint=f"drop at most {most}: the first {layers - most} always stay",
        )
    return tuple(range(layers - number, layers))


def target_of_kept(
    source: Source, base_config: PreTrainedConfig, config: PruneConfig, dropped: Collection[int]
) -> Target | None:
    """The limit that the options set, for the blocks that are not dropped.

    A fraction is one of the dense model, see `slimgpt.pruning.targets.find_target`.
    """
    target = find_target(source, config_without(base_config, dropped), config)
    if not dropped or target is None or not target.whole:
        return target
    dense = find_target(source, base_config, config)
    assert dense is not None
    return replace(target, whole=dense.whole, limit=dense.limit)


def config_without(base_config: PreTrainedConfig, dropped: Collection[int]) -> PreTrainedConfig:
    """Config of a model of which only some layers are dropped.

    Raises
    ------
    UnsupportedModelError
        If a key of the config does not allow it.
    """
    if not dropped:
        return base_config
    shapes = shapes_of(base_config)
    widths = with_dropped(
        [s for i, s in enumerate(map(whole_widths, shapes)) if i not in dropped], shapes, dropped
    )
    return pruned_config(base_config, widths, is_plain(base_config))


def with_dropped(
    widths: Sequence[BlockWidths], shapes: Sequence[BlockShape], dropped: Collection[int]
) -> list[BlockWidths]:
    """Widths of all blocks, from those of the blocks that are not dropped."""
    kept = iter(widths)
    return [
        (0,) * len(shape.sublayers) if index in dropped else next(kept)
        for index, shape in enumerate(shapes)
    ]


def without_dropped(
    shapes: Sequence[BlockShape], widths: Sequence[BlockWidths]
) -> tuple[list[BlockShape], list[BlockWidths]]:
    """Shapes and widths of the blocks that are not dropped."""
    pairs = zip(shapes, widths, strict=True)
    kept = [(shape, width) for shape, width in pairs if not is_dropped(width)]
    return [shape for shape, _ in kept], [width for _, width in kept]


def initial_widths(
    shapes: Sequence[BlockShape],
    base_config: PreTrainedConfig,
    config: PruneConfig,
    target: Target | None,
    dropped: Collection[int] = (),
) -> list[BlockWidths]:
    """Compute the widths for a target, given layer ratios or the schedule, without measurement.

    Parameters
    ----------
    shapes : sequence of BlockShape
        The blocks of the dense model.
    base_config : PreTrainedConfig
        Its config.
    config : PruneConfig
        The options.
    target : Target or None
        A limit on the model without the dropped blocks.
    dropped : collection of int
        Blocks that are dropped; the others share what is left of the ratio or target.

    Raises
    ------
    ConfigError
        If a block would lose more than it can, or the dropped blocks are more than the ratio.
    """
    rules = width_rules(base_config, config)
    if config.layer_ratios:
        return given_widths(shapes, config.layer_ratios, rules)
    kept = [shape for index, shape in enumerate(shapes) if index not in dropped]
    if target is not None:
        schedule = Schedule(config.ratio, config.schedule, config.min_ratio)
        return with_dropped(target_widths(kept, target, schedule, rules), shapes, dropped)
    ratio = _ratio_of_kept(shapes, config.ratio, dropped)
    schedule = Schedule(ratio, config.schedule, config.min_ratio)
    return with_dropped(scheduled_widths(kept, schedule, rules), shapes, dropped)


def _ratio_of_kept(shapes: Sequence[BlockShape], ratio: float, dropped: Collection[int]) -> float:
    """Ratio of the kept blocks that gives the ratio of all; 0 leaves them whole."""
    total, freed = sum(s.params for s in shapes), sum(shapes[index].params for index in dropped)
    if not (ratio and dropped):
        return ratio
    if freed > ratio * total:
        raise ConfigError(
            f"ratio={ratio} asks for {ratio * total:,.0f} of the {total:,} prunable parameters, "
            f"and the {len(dropped)} dropped layers alone have {freed:,} ({freed / total:.2%})",
            hint="drop fewer layers, or leave out --ratio to remove nothing else",
        )
    return (ratio * total - freed) / (total - freed)


def width_rules(base_config: PreTrainedConfig, config: PruneConfig) -> WidthRules:
    """Find which widths the blocks may have."""
    share = config.attention_share
    if config.target_kv_cache is not None:
        share = 1.0
    return WidthRules(
        config.multiple_of,
        uniform_group_counts(base_config) if config.uniform else None,
        attention_share(base_config) if share is None else share,
        config.expert_units,
        config.tensor_parallel,
    )


def make_plan(
    base_config: PreTrainedConfig,
    config: PruneConfig,
    widths: Sequence[BlockWidths],
    target: Target | None,
) -> PrunePlan:
    """Compute the ratios and parameter counts that follow from the widths."""
    skeleton = build_skeleton(base_config)
    shapes = [block.shape for block in bind(skeleton)]
    given = sum(r * s.params for r, s in zip(config.layer_ratios, shapes, strict=False))
    dropped = tuple(index for index, width in enumerate(widths) if is_dropped(width))
    prunable = sum(shape.params for shape in shapes)
    seqlen = min(config.seqlen, base_config.get_text_config().max_position_embeddings)
    removed = [removed_params(s, w) for s, w in zip(shapes, widths, strict=True)]
    extended = make_method(config).extend_config(base_config)
    result = build_skeleton(
        pruned_config(extended, widths, is_uniform(base_config, config, shapes, widths))
    )
    before, after = skeleton.num_parameters(), result.num_parameters()
    block_ratio = sum(removed) / prunable
    asked = given / prunable if config.layer_ratios else config.ratio
    return PrunePlan(
        shapes=tuple(shapes),
        widths=tuple(widths),
        layer_ratios=tuple(r / s.params for r, s in zip(removed, shapes, strict=True)),
        target_ratio=block_ratio if target or (dropped and not config.ratio) else asked,
        block_ratio=block_ratio,
        total_ratio=1 - after / before,
        params_before=before,
        params_after=after,
        is_measured=is_measured(shapes, widths, seqlen, config),
        target=target and _reached(target, *without_dropped(shapes, widths)),
        dropped=dropped,
    )


def is_uniform(
    base_config: PreTrainedConfig,
    config: PruneConfig,
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
) -> bool:
    """Whether the stock class loads the result: as asked for, or if only whole layers are gone."""
    kept_shapes, kept = without_dropped(shapes, widths)
    only_layers = len(kept) < len(widths) and kept == list(map(whole_widths, kept_shapes))
    return config.uniform or (only_layers and is_plain(base_config))


def _reached(
    target: Target, shapes: Sequence[BlockShape], widths: Sequence[BlockWidths]
) -> ReachedTarget:
    value = target.value(target.cost(shapes, widths))
    return ReachedTarget(target.option, target.asked, value, target.unit)


def is_measured(
    shapes: Sequence[BlockShape], widths: Sequence[BlockWidths], seqlen: int, config: PruneConfig
) -> bool:
    """Whether a sensitivity pass runs: requested, units to remove, and enough samples.

    It does not measure experts.
    """
    shapes, widths = without_dropped(shapes, widths)
    if has_experts(shapes):
        return False
    removed = any(removed_params(s, w) for s, w in zip(shapes, widths, strict=True))
    needed = samples_needed(shapes, seqlen)
    return config.widths != "scheduled" and removed and config.nsamples >= needed


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
    text = config.get_text_config()
    found = family_in(config).prunable_attention(text)
    if not found:
        return 1.0
    index, attention = found
    counts = attention.counts(text.per_layer_config[index])
    groups, heads = counts["group"], counts["head"]
    return (1 + groups / heads) / 2 if groups > 1 else 0.5
