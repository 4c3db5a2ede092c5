"""The plan of a run: the widths of every block, and what they amount to."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.allocation.reallocation import samples_needed
from slimgpt.allocation.schedule import Schedule, WidthRules, given_widths, scheduled_widths
from slimgpt.allocation.shapes import BlockShape, BlockWidths, SublayerShape, removed_params
from slimgpt.checkpoint.writer import pruned_config, uniform_group_counts
from slimgpt.config import PruneConfig
from slimgpt.methods.registry import make_method
from slimgpt.models.family import bind, family_of
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import find_model


@dataclass(frozen=True)
class PrunePlan:
    """Widths of every block and what they amount to.

    Attributes
    ----------
    shapes : tuple of BlockShape
        What could be removed from each block.
    widths : tuple of tuple of int
        Units that each block keeps, by sublayer: key/value groups and FFN channels.
    layer_ratios : tuple of float
        Fraction of its prunable parameters that each block loses.
    target_ratio, block_ratio, total_ratio : float
        Fraction to remove of the prunable block parameters as asked for, as planned, and what
        that is of all parameters, embeddings included.
    params_before, params_after : int
        All parameters.
    is_measured : bool
        Whether a sensitivity pass decides the widths; those of a plan are what it begins with.
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

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PrunePlan":
        """Invert `dataclasses.asdict` and a way through JSON; there may be other keys too."""
        shapes = (
            BlockShape(tuple(SublayerShape(**sublayer) for sublayer in shape["sublayers"]))
            for shape in values["shapes"]
        )
        own = {field.name: values[field.name] for field in fields(cls)}
        sequences = {
            "shapes": tuple(shapes),
            "widths": tuple(map(tuple, values["widths"])),
            "layer_ratios": tuple(values["layer_ratios"]),
        }
        return cls(**own | sequences)


def plan(model: str, **options: Any) -> PrunePlan:
    """Work out the widths of a pruned model, without its weights.

    If the run measures the widths, these are the ones that it begins with; the total that they
    remove does not change.

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
    return make_plan(base_config, config, initial_widths(base_config, config))


def initial_widths(base_config: PreTrainedConfig, config: PruneConfig) -> list[BlockWidths]:
    """Widths that follow from the ratios alone, given or scheduled.

    Raises
    ------
    ConfigError
        If a block would lose more than it can.
    """
    shapes = shapes_of(base_config)
    share = config.attention_share
    rules = WidthRules(
        config.multiple_of,
        uniform_group_counts(base_config) if config.uniform else None,
        attention_share(base_config) if share is None else share,
    )
    if config.layer_ratios:
        return given_widths(shapes, config.layer_ratios, rules)
    schedule = Schedule(config.ratio, config.schedule, config.min_ratio)
    return scheduled_widths(shapes, schedule, rules)


def make_plan(
    base_config: PreTrainedConfig, config: PruneConfig, widths: Sequence[BlockWidths]
) -> PrunePlan:
    """Say what the widths amount to."""
    skeleton = build_skeleton(base_config)
    shapes = [block.shape for block in bind(skeleton)]
    given = sum(r * s.params for r, s in zip(config.layer_ratios, shapes, strict=False))
    prunable = sum(shape.params for shape in shapes)
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
        is_measured=is_measured(base_config, config, widths),
    )


def is_measured(
    base_config: PreTrainedConfig, config: PruneConfig, widths: Sequence[BlockWidths]
) -> bool:
    """Whether a sensitivity pass decides the widths: it is asked for and has enough samples."""
    shapes = shapes_of(base_config)
    removed = sum(removed_params(s, w) for s, w in zip(shapes, widths, strict=True))
    needed = samples_needed(shapes, min(config.seqlen, base_config.max_position_embeddings))
    return config.widths == "measured" and removed > 0 and config.nsamples >= needed


def shapes_of(base_config: PreTrainedConfig) -> list[BlockShape]:
    """What can be removed from each block of a model."""
    return [block.shape for block in bind(build_skeleton(base_config))]


def attention_share(config: Any) -> float:
    """Ratio of attention over that of its block at which a query head costs as in MHA.

    A query head with its share of a kv head has 2 + 2/g matrices of head_dim × hidden_size, where g
    query heads share a kv head, and 4 in MHA. If the errors of attention and FFN grow with the
    squares of their ratios, their sum is least for a given number of parameters where the ratio of
    attention is in proportion to what a head frees: (2 + 2/g)/4 of that in MHA, which is 1.
    """
    config = config.per_layer_config[0]
    kv_heads, heads = family_of(config.model_type).sublayer("attention").widths
    return (1 + getattr(config, kv_heads) / getattr(config, heads)) / 2
