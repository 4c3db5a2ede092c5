"""Config of a model without some of its layers."""

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.errors import UnsupportedModelError

# Lists with an entry for each layer. transformers derives them when it reads a config without them.
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")

# Periods from which such a list is derived; where the list is given, nothing reads them.
_PERIODS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}

# Numbers of layers at the start of the model that differ from those after them.
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers")

# Other lists that may happen to be as long as there are layers.
_NOT_BY_LAYER = ("mlp_only_layers", "bos_token_id", "eos_token_id", "pad_token_id")

_SCALED_BY_INDEX = "scale_attn_by_inverse_layer_idx"

_DEEPSTACK = "deepstack_visual_indexes"


def first_droppable(config: PreTrainedConfig) -> int:
    """Index of the first layer that can be dropped.

    The first layer stays, because no layer before it could compensate. So do those after which
    features of an image are added.
    """
    vision = getattr(config, "vision_config", None)
    return max(1, len(getattr(vision, _DEEPSTACK, None) or ()))


def without_layers(
    config: PreTrainedConfig, values: Mapping[str, Any], dropped: Collection[int]
) -> dict[str, Any]:
    """Remove layers from the values of a config.

    Parameters
    ----------
    config : PreTrainedConfig
        A text model's config.
    values : mapping of str to Any
        Its values.
    dropped : collection of int
        Indices of the layers.

    Raises
    ------
    UnsupportedModelError
        If a key that depends on the layers cannot be changed. The message names it.
    """
    if not dropped:
        return dict(values)
    before: int = config.num_hidden_layers
    kept = [index for index in range(before) if index not in dropped]
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    result: dict[str, Any] = dict(values) | {name: len(kept)}
    for key, value in values.items():
        if isinstance(value, list | tuple) and len(value) == before and key not in _NOT_BY_LAYER:
            if key not in _BY_LAYER:
                raise _refused(key, value, "may have an entry for each layer")
            result[key] = [value[index] for index in kept]
        if key in _PERIODS and value and not values.get(_PERIODS[key]):
            raise _refused(key, value, f"counts layers, and there is no {_PERIODS[key]}")
        if key in _FIRST_LAYERS and isinstance(value, int):
            result[key] = value - sum(index < value for index in dropped)
    if values.get(_SCALED_BY_INDEX):
        raise _refused(_SCALED_BY_INDEX, True, "scales each layer by its index")
    return result | _dense_layers(values, kept)


def _dense_layers(values: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """Keys that name the layers without experts: by index, so that no period is needed."""
    step, dense = values.get("decoder_sparse_step"), values.get("mlp_only_layers")
    if step is None and dense is None:
        return {}
    new = [
        place
        for place, index in enumerate(kept)
        if index in (dense or ()) or (index + 1) % (step or 1)
    ]
    return {"mlp_only_layers": new} | ({} if step is None else {"decoder_sparse_step": 1})


def _refused(key: str, value: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"no layer of this model can be dropped: {key}={value!r} in its config {reason}",
        hint="leave out --drop-layers",
    )
