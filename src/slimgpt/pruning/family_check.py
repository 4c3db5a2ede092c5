"""Check the description of a family on the model itself, with random weights.

A block must compute the same as the pipeline, which runs it one sublayer at a time. Fewer units
must change exactly the tensors that the description names. The block of the smaller model, with
the rows and columns that the units keep, must compute the same as the dense block without the
others. Only the config is read; one block at a time is in memory.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths, Width, has_experts
from slimgpt.calibration.activations import Stream, embed, pass_block
from slimgpt.checkpoint.writer import pruned_config
from slimgpt.errors import UnsupportedModelError
from slimgpt.models.blocks import Block, bind, decoder_of, settings_of
from slimgpt.models.layout import family_in
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import find_model
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import Kept
from slimgpt.pruning.slicing import masked_sublayer, slice_sublayer

NUM_SAMPLES, NUM_TOKENS, VOCABULARY = 2, 8, 16

FEW_CHANNELS = 16

TOLERANCE = 1e-4  # relative; norms and positions are in float32


@dataclass(frozen=True)
class SublayerCheck:
    """What was found on a sublayer of a block.

    Attributes
    ----------
    block, kind : int, str
        Index of the block, and kind of the sublayer.
    tensors : tuple of str
        Tensors that shrink with the units.
    difference : float or None
        Relative difference between the smaller block and the dense block without the removed
        units; None if nothing can be removed.
    """

    block: int
    kind: str
    tensors: tuple[str, ...]
    difference: float | None


@dataclass(frozen=True)
class FamilyCheck:
    """The result of a check that passed.

    Attributes
    ----------
    model_type : str
        The family.
    differences : dict of int to float
        For one block of each kind, the relative difference between its own forward and the form in
        which the pipeline runs it.
    sublayers : tuple of SublayerCheck
        The sublayers of these blocks.
    """

    model_type: str
    differences: dict[int, float]
    sublayers: tuple[SublayerCheck, ...]


def check(model: str) -> FamilyCheck:
    """Check that the description of a model's family holds for it, without reading weights.

    `slimgpt.prune` does the same before any work.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or the name of an embedded model.

    Raises
    ------
    SlimGPTError
        If the model cannot be read, or see `check_family`.
    """
    return check_family(load_config(find_model(model)))


def check_family(config: PreTrainedConfig) -> FamilyCheck:
    """Check that the description of a family holds for a model with this config.

    A process checks a config once.

    Raises
    ------
    UnsupportedModelError
        If a block computes something else, or another tensor shrinks with the units. The message
        names the block and the tensor, or the difference.
    """
    key = config.to_json_string() + family_in(config).model_dump_json()
    if key not in _checked:
        _checked[key] = _check(config)
    return _checked[key]


_checked: dict[str, FamilyCheck] = {}


@torch.no_grad()
def _check(config: PreTrainedConfig) -> FamilyCheck:
    model_type, dense = config.model_type, _skeleton(config)
    blocks = list(bind(dense))
    if has_experts([block.shape for block in blocks]):
        config = _with_few_experts(config, blocks)
        dense = _skeleton(config)
        blocks = list(bind(dense))
    kinds = {sublayer.kind for block in blocks for sublayer in block.sublayers}
    with_parts = {s.kind for block in blocks for s in block.sublayers if s.shape.parts > 1}
    removals = [(kind, False) for kind in sorted(kinds)]
    removals += [(kind, True) for kind in sorted(with_parts)]
    smaller = {removal: _smaller(config, _halved(blocks, *removal)) for removal in removals}
    stream = _random_stream(dense)
    returns_tuple = family_in(config).returns_tuple
    differences: dict[int, float] = {}
    checks = []
    for block in _distinct(blocks):
        _randomize(block.module, block.index)
        differences[block.index] = _check_form(block, stream, returns_tuple)
        for sublayer in block.sublayers:
            for kind, parts in removals:
                if kind == sublayer.kind:
                    small = smaller[kind, parts][block.index]
                    checks.append(_check_units(block, sublayer, small, stream, parts))
                    small.module.to("meta")
        block.module.to("meta")
    return FamilyCheck(model_type, differences, tuple(checks))


def _with_few_experts(config: PreTrainedConfig, blocks: Sequence[Block]) -> PreTrainedConfig:
    """Config with a few small experts: layers of many are too large for random weights."""

    def width(sublayer: Sublayer) -> Width:
        shape = sublayer.shape
        if shape.kind != "experts":
            return shape.num_units
        number = min(shape.num_units, 2 * shape.fewest)
        return (number, min(shape.parts, FEW_CHANNELS)) if shape.parts > 1 else number

    widths = [tuple(map(width, block.sublayers)) for block in blocks]
    return pruned_config(config, widths, uniform=False)


def _smaller(config: PreTrainedConfig, widths: Sequence[BlockWidths]) -> list[Block]:
    return list(bind(_skeleton(pruned_config(config, widths, uniform=False))))


def _skeleton(config: Any) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"  # the others take no float64
    return build_skeleton(config, torch.float64)  # its products are never in bfloat16


def _halved(blocks: Sequence[Block], kind: str, parts: bool) -> list[BlockWidths]:
    """Widths of a model that keeps every second unit, or part, of one kind of sublayer."""

    def width(sublayer: Sublayer) -> Width:
        if sublayer.kind != kind:
            return sublayer.num_units
        kept = _kept(sublayer, parts)
        num_units = len(kept.units)
        return num_units if kept.parts is None else (num_units, len(kept.parts) // num_units)

    return [tuple(map(width, block.sublayers)) for block in blocks]


def _kept(sublayer: Sublayer, parts: bool) -> Kept:
    """Every second unit, or every second part of all units; or all if none can be removed."""
    shape = sublayer.shape
    all_units = torch.arange(sublayer.num_units)
    if parts and shape.parts > 1:
        kept_parts = torch.arange(0, shape.parts, 2)
        return Kept(all_units, (all_units[:, None] * shape.parts + kept_parts).flatten())
    if parts or shape.is_fixed:
        return Kept(all_units)
    groups = all_units.view(shape.multiple, -1)  # each keeps equally many
    number = max((groups.shape[1] + 1) // 2, shape.fewest // shape.multiple)
    ordered = torch.cat([groups[:, ::2], groups[:, 1::2]], dim=1)
    return Kept(ordered[:, :number].flatten().sort().values)


def _distinct(blocks: Sequence[Block]) -> Iterator[Block]:
    """One block of each kind: they differ in modules, switches or settings, not only in widths."""
    seen = set()
    for block in blocks:
        if (kind := settings_of(block.module)) not in seen:
            seen.add(kind)
            yield block


def _random_stream(model: Any) -> Stream:
    """The input of the first block and the blocks' other arguments, for random tokens."""
    embedding = model.get_input_embeddings()
    small = nn.Embedding(VOCABULARY, embedding.weight.shape[1], device="meta", dtype=model.dtype)
    model.set_input_embeddings(small)
    blocks = f"{family_in(model.config).blocks}."
    decoder = decoder_of(model)
    names = [name for name, _ in decoder.named_parameters() if not name.startswith(blocks)]
    _randomize(decoder, 0, names)
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(VOCABULARY, (NUM_SAMPLES, NUM_TOKENS), generator=generator)
    try:
        stream = embed(model, tokens_NT, NUM_SAMPLES)
    except (RuntimeError, AttributeError) as err:
        raise UnsupportedModelError(
            f"the decoder does not run without its blocks: {err}",
            hint="correct decoder, blocks or returns_tuple in the family's file",
        ) from err
    stream.hidden_NTC.normal_(generator=generator)
    return stream


def _randomize(module: nn.Module, seed: int, names: Sequence[str] | None = None) -> None:
    """Give the parameters of a module on the meta device random values."""
    generator, values = torch.Generator().manual_seed(seed), {}
    for name, parameter in module.named_parameters():
        if names is None or name in names:
            value = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if value.dim() > 1:
                value /= value.shape[-1] ** 0.5
            else:
                value = 0.2 * value + (not name.endswith("bias"))
            values[name] = value
    module.load_state_dict(values, strict=False, assign=True)


def _check_form(block: Block, stream: Stream, returns_tuple: bool) -> float:
    """Compare the block's own forward with the form in which the pipeline runs it."""
    result = _forward(block, stream, f"block {block.index}")
    if isinstance(result, tuple) != returns_tuple:
        raise UnsupportedModelError(
            f"block {block.index} returns a {type(result).__name__}, which contradicts the "
            "description of its family",
            hint="set returns_tuple in the family's file",
        )
    difference = _difference(_passed(block, stream), _first(result))
    if not difference < TOLERANCE:
        raise UnsupportedModelError(
            f"block {block.index} computes something else than the description of its family "
            f"says: the outputs differ by {difference:.1%}",
            hint="this model cannot be pruned: its norms, multipliers or residual connections "
            "are not those of its family's file",
        )
    return difference


def _check_units(
    block: Block, sublayer: Sublayer, small: Block, stream: Stream, parts: bool
) -> SublayerCheck:
    """Compare a block that was built with half of a sublayer's units with one that was sliced."""
    place = f"block {block.index}, {sublayer.kind}"
    kept, module = _kept(sublayer, parts), copy.deepcopy(sublayer.module)
    sliced, kept_output = replace(sublayer, module=module), sublayer.kept_output(kept)
    slice_sublayer(sliced, kept, kept_output)
    prefix = sublayer.name.removeprefix(block.name).removeprefix(".")
    dense = block.module.state_dict()
    changed = {f"{prefix}.{k}".removeprefix("."): v for k, v in module.state_dict().items()}
    state = dense | changed
    wanted = {name: tuple(tensor.shape) for name, tensor in small.module.state_dict().items()}
    for name in sorted(wanted.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else None
        if found != wanted.get(name):
            raise UnsupportedModelError(
                f"{place}: with half of the units the model has {name} in the shape "
                f"{wanted.get(name)}, but the description of its family gives {found}",
                hint="name the tensor and its segments in the family's file",
            )
    tensors = tuple(name for name in changed if state[name].shape != dense[name].shape)
    if not tensors:
        return SublayerCheck(block.index, sublayer.kind, tensors, None)
    if not sublayer.spec.couples_units:  # then the removed units can be masked
        sliced = masked_sublayer(sublayer, kept, kept_output)
    small.module.load_state_dict(state, assign=True)
    own_NTC = _first(_forward(small, stream, f"{place}, with half of the units"))
    sublayers = tuple(sliced if s is sublayer else s for s in block.sublayers)
    difference = _difference(_passed(replace(block, sublayers=sublayers), stream), own_NTC)
    if not difference < TOLERANCE:
        raise UnsupportedModelError(
            f"{place}: a model with half of the units computes something else than the dense "
            f"model without the others: the outputs differ by {difference:.1%}",
            hint="correct the segments of the tensors in the family's file",
        )
    return SublayerCheck(block.index, sublayer.kind, tensors, difference)


def _forward(block: Block, stream: Stream, place: str) -> Any:
    """Run the block's own forward."""
    try:
        return block.module(stream.hidden_NTC, **stream.kwargs[block.index])
    except RuntimeError as err:
        raise UnsupportedModelError(
            f"{place}: the stock class does not run: {err}",
            hint="if only fewer units fail, give the sublayer no widths in the family's file, "
            "and the reason; else correct the config",
        ) from err


def _passed(block: Block, stream: Stream) -> Tensor:
    """The stream after a block, one sublayer at a time."""
    passed = replace(stream, hidden_NTC=stream.hidden_NTC.clone())
    try:
        pass_block(block, passed)
    except (RuntimeError, IndexError, TypeError, ValueError) as err:  # of other modules
        raise UnsupportedModelError(
            f"block {block.index} does not run as the description of its family says: {err}",
            hint="the modules have another form in this version of transformers: `slimgpt "
            "families` says which were tested",
        ) from err
    return passed.hidden_NTC


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
