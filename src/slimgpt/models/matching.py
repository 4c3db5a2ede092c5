"""Match the tensors of a checkpoint with a model, and check that they are exactly those."""

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import MergeModulelist, dot_natural_key

from slimgpt.errors import UnsupportedModelError
from slimgpt.models.family import family_of
from slimgpt.models.layout import NativeName, is_wrapped, native_names
from slimgpt.models.stored import StoredTensor, loading

log = logging.getLogger(__name__)

# Floating-point types by their safetensors names.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

HEAD = "lm_head"

# Buffers saved by older versions of transformers; they follow from the config.
_BUFFERS = (
    r"rotary_emb\.(inv_freq|(cos|sin)_cached)$",
    r"(^|\.)position_ids$",
    r"\.attn\.(masked_)?bias$",
)

# Suffixes of tensor names for scales and packed values in the usual quantised formats.
_QUANTISED = re.compile(
    r"(_scale(_inv|_2)?|_scales|_blocks|\.scales|\.(qweight|qzeros|g_idx|SCB|absmax|quant_map"
    r"|weight_packed|weight_zero_point|weight_format)|\.quant_state\..*)$"
)

_DEQUANTISE = (
    "take the model's version in bfloat16, or load this one with transformers, dequantise it "
    "(model.dequantize()) and save it; prune that, and quantise the result"
)


def match_config(
    model: str, stored: Mapping[str, StoredTensor], config: PreTrainedConfig
) -> dict[str, StoredTensor]:
    """Check stored tensors against a config, before any part of the model is built.

    Parameters
    ----------
    model : str
        Its name, for error messages.
    stored : dict
        From `read_headers`.
    config : PreTrainedConfig
        The model's config.

    Returns
    -------
    dict
        The tensors by their names in the causal language model, where the text model is by itself.
        (In a checkpoint of the bare decoder the names lack the prefix.)

    Raises
    ------
    UnsupportedModelError
        If the tensors are quantised or not floating-point, or the number of blocks differs from
        the config.
    """
    _check_types(model, stored)
    if is_wrapped(config):
        return dict(stored)
    family = family_of(config.model_type)
    prefix = f"{family.decoder}."
    if not any(name.startswith(prefix) for name in stored):
        stored = {
            name if name.startswith(f"{HEAD}.") else prefix + name: tensor
            for name, tensor in stored.items()
        }
    block = re.compile(rf"{re.escape(prefix + family.blocks)}\.(\d+)\.")
    stored = _without_predictors(model, stored, block, config)
    found = [int(match[1]) for match in map(block.match, stored) if match]
    number = max(found, default=-1) + 1
    if number != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{model}: its config has num_hidden_layers={config.num_hidden_layers}, but its files "
            f"hold {number} blocks with {len(stored)} tensors in all",
            hint="correct config.json, or download or write the checkpoint again",
        )
    return dict(stored)


def _without_predictors(
    model: str,
    stored: Mapping[str, StoredTensor],
    block: re.Pattern[str],
    config: PreTrainedConfig,
) -> dict[str, StoredTensor]:
    """Leave out the layers for multi-token prediction, which transformers does not load."""
    first = config.num_hidden_layers
    last = first + (getattr(config, "num_nextn_predict_layers", None) or 0)
    extra = [n for n in stored if (match := block.match(n)) and first <= int(match[1]) < last]
    if extra:
        log.warning(
            "%s: the result has no layers for multi-token prediction; %d tensors are left out, "
            "first %s",
            model,
            len(extra),
            min(extra),
        )
    return {name: tensor for name, tensor in stored.items() if name not in set(extra)}


def fit_tensors(
    model: str,
    stored: Mapping[str, StoredTensor],
    skeleton: PreTrainedModel,
    adds_biases: bool = False,
) -> dict[str, StoredTensor]:
    """Check that the stored tensors are exactly those of a model.

    Parameters
    ----------
    model : str
        Its name, for error messages.
    stored : dict
        From `match_config`.
    skeleton : PreTrainedModel
        The model without weights.
    adds_biases : bool
        Whether biases that are not stored are zero.

    Returns
    -------
    dict
        The stored tensors by their names in the model; tied ones are listed under both names.

    Raises
    ------
    UnsupportedModelError
        If tensors are missing, have another shape or are unused, or if tensors differ that the
        config ties.
    """
    stored, wanted = _with_native_names(stored, skeleton), skeleton.state_dict()
    for name, origin in skeleton.all_tied_weights_keys.items():
        if name in stored:
            first = stored.setdefault(origin, stored[name])
            if first is not stored[name] and not torch.equal(stored[name].read(), first.read()):
                raise UnsupportedModelError(
                    f"{model}: the config ties {name} to {origin}, but they differ",
                    hint="set tie_word_embeddings to false in its config.json",
                )
        wanted.pop(name)
    if adds_biases:
        stored |= {
            name: _zeros(tuple(tensor.shape))
            for name, tensor in wanted.items()
            if name.endswith(".bias") and name not in stored
        }
    _check_no_others(model, stored, skeleton)
    problems = [
        f"{name} ({_described(tensor.shape)}, but {_described(stored[name].shape)} in the file)"
        if name in stored
        else name
        for name, tensor in wanted.items()
        if name not in stored or stored[name].shape != tensor.shape
    ]
    if problems == [f"{HEAD}.weight"]:
        (kind,) = (getattr(skeleton.config, "architectures", None) or ["the bare decoder"])[:1]
        raise UnsupportedModelError(
            f"{model} lacks {HEAD}.weight: it is a checkpoint of {kind}, which has no head for "
            "language modelling",
            hint="take the checkpoint of the causal language model; if its head shares the weights "
            "of the embedding, set tie_word_embeddings to true in config.json",
        )
    if problems:
        raise incomplete(model, problems)
    return stored


def _with_native_names(
    stored: Mapping[str, StoredTensor], skeleton: PreTrainedModel
) -> dict[str, StoredTensor]:
    """List stored tensors by their names in the model, see `slimgpt.models.layout.native_names`.

    Where transformers makes one tensor of several, as of the weights of all experts, so does this.

    Raises
    ------
    UnsupportedModelError
        If two of them have the same name there.
    """
    native: dict[str, StoredTensor] = {}
    sources: dict[str, list[tuple[str, NativeName]]] = defaultdict(list)
    for name, own in native_names(skeleton, list(stored)).items():
        if own.converter:
            sources[own.name].append((name, own))
            continue
        if own.name in native:
            other = native[own.name].origin or own.name
            raise UnsupportedModelError(
                f"{name} and {other} are the same tensor of the model",
                hint="remove one of them from the checkpoint",
            )
        tensor = stored[name]
        native[own.name] = tensor if name == own.name else replace(tensor, origin=name)
    for name, parts in sources.items():
        if name in native:
            raise UnsupportedModelError(
                f"{parts[0][0]} and {native[name].origin or name} are the same tensor of the model",
                hint="remove one of them from the checkpoint",
            )
        native[name] = _converted(name, sorted(parts, key=lambda p: dot_natural_key(p[0])), stored)
    return native


def _converted(
    name: str, parts: Sequence[tuple[str, NativeName]], stored: Mapping[str, StoredTensor]
) -> StoredTensor:
    """Make one tensor of the model from several stored ones, as transformers does."""
    by_pattern: dict[str, list[str]] = defaultdict(list)
    for source, own in parts:
        by_pattern[str(own.pattern)].append(source)

    def convert(read: Callable[[StoredTensor], Tensor], chosen: slice = slice(None)) -> Tensor:
        converter: Any = copy.deepcopy(parts[0][1].converter)
        for pattern, sources in by_pattern.items():
            for source in sources[chosen]:
                converter.add_tensor(name, source, pattern, partial(read, stored[source]))
        (tensor,) = converter.convert(name).values()
        return tensor

    def empty(tensor: StoredTensor) -> Tensor:
        return torch.empty(tensor.shape, device="meta")

    def read(tensor: StoredTensor) -> Tensor:
        return tensor.read()

    def read_row(index: int) -> Tensor:
        return convert(read, slice(index, index + 1))[0]

    _check_numbers(name, list(by_pattern.values()))
    with loading(f"{len(parts)} tensors that make {name}"):
        shape = tuple(convert(empty).shape)
    first: Any = getattr(parts[0][1].converter, "operations", [None])[0]
    is_list = isinstance(first, MergeModulelist) and first.dim == 0
    return StoredTensor(
        partial(convert, read),
        shape,
        stored[parts[0][0]].dtype,
        is_converted=True,
        read_row=read_row if is_list else None,
    )


def _check_numbers(name: str, lists: Sequence[Sequence[str]]) -> None:
    """Check that the parts of a tensor are numbered 0, 1, … without gaps, each list alike."""
    length = max(map(len, lists))
    for names in lists:
        found = [
            int(number) for part in names for number in re.findall(r"\.experts\.(\d+)\.", part)
        ]
        if found and found != list(range(length)):
            missing = min({*range(length)} - {*found}, default=length - 1)
            raise UnsupportedModelError(
                f"the parts of {name} are those of {len(found)} experts, numbered to "
                f"{max(found)}; {missing} is missing, beside {names[0]}",
                hint="the checkpoint is incomplete: download or write it again",
            )


def _zeros(shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(partial(torch.zeros, shape), shape, "F32")


def incomplete(model: str, problems: Sequence[str]) -> UnsupportedModelError:
    """Build the error for missing tensors or tensors of another shape."""
    return UnsupportedModelError(
        f"{model} lacks {len(problems)} weights or has them in another shape, first "
        f"{min(problems)}",
        hint="the checkpoint is incomplete, or its config.json belongs to another one: download "
        "or write it again",
    )


def unused(model: str, names: Sequence[str]) -> UnsupportedModelError:
    """Build the error for tensors that the model does not use."""
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return UnsupportedModelError(
        f"{model} holds {len(names)} tensors that its model does not use and that would be lost: "
        f"{listed}",
        hint="if they are not needed, load the model with transformers and save it again; if they "
        "are, correct config.json, or this kind of model cannot be pruned",
    )


def _check_types(model: str, stored: Mapping[str, StoredTensor]) -> None:
    for name in stored:
        if _QUANTISED.search(name):
            raise UnsupportedModelError(
                f"{model} is quantised: it has scales or packed values in {name}",
                hint=_DEQUANTISE,
            )
    harmless = re.compile("|".join(_BUFFERS))
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES and not harmless.search(name):
            raise UnsupportedModelError(
                f"{model}: the tensor {name} has the type {tensor.dtype}, not one of "
                f"{', '.join(DTYPES)}",
                hint=_DEQUANTISE,
            )


def _check_no_others(
    model: str, stored: Mapping[str, StoredTensor], skeleton: PreTrainedModel
) -> None:
    patterns = [*_BUFFERS, *(skeleton._keys_to_ignore_on_load_unexpected or ())]
    harmless, known = re.compile("|".join(f"(?:{p})" for p in patterns)), skeleton.state_dict()
    others = [name for name in stored if name not in known and not harmless.search(name)]
    if others:
        raise unused(model, others)


def _described(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
