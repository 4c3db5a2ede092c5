"""Write a pruned model as a checkpoint that loads with stock tools."""

import contextlib
import json
from collections import ChainMap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from slimgpt.allocation.shapes import BlockWidths, Width, is_dropped, written_width
from slimgpt.checkpoint import modeling_slimgpt
from slimgpt.checkpoint.depth import without_layers
from slimgpt.checkpoint.registration import pruned_classes
from slimgpt.errors import UnsupportedModelError
from slimgpt.models.family import PRUNED_PREFIX, SublayerSpec, family_of
from slimgpt.models.layout import auto_class_of, family_in, is_wrapped
from slimgpt.models.weights import file_bytes, write_file
from slimgpt.runtime.files import read_json

_METADATA = {"format": "pt"}

_STALE_KEYS = (
    "model_type",
    "architectures",
    "auto_map",
    "per_layer_config",
    "_model_name_or_path",
    "blocks_path",
    "attention_output",
)


def pruned_config(
    config: PreTrainedConfig, widths: Sequence[BlockWidths], uniform: bool
) -> PreTrainedConfig:
    """Make the config of the pruned model.

    Parameters
    ----------
    config : PreTrainedConfig
        Config of the dense model.
    widths : sequence of tuple of int
        Units that each block keeps, by sublayer. Blocks that keep none are left out.
    uniform : bool
        Whether all blocks have the same widths, so that the stock class loads the result.

    Returns
    -------
    PreTrainedConfig
        A new config. It states ``head_dim``, which in a pruned layer no longer follows from the
        hidden size and the number of heads. Where the stock class takes it from these all the same,
        it also states the path of the output projection of attention, with which the modelling file
        rebuilds the layers.

    Raises
    ------
    UnsupportedModelError
        If a key of the config does not allow to leave out a layer, or the stock class cannot have
        as few heads.
    """
    auto_class: Any = auto_class_of(config)
    text = config.get_text_config()
    result = _pruned_text_config(text, widths, uniform)
    if is_wrapped(config):
        values, model_type = _kept_values(config), config.model_type.removeprefix(PRUNED_PREFIX)
        stock: Any = CONFIG_MAPPING[model_type]
        config_class = stock if uniform else pruned_classes(model_type)["AutoConfig"]
        result = config_class(**values | {"text_config": result})
    if not uniform:
        names = ("AutoConfig", "AutoModel", auto_class.__name__)
        classes = pruned_classes(result.model_type.removeprefix(PRUNED_PREFIX))
        module = modeling_slimgpt.__name__.rpartition(".")[2]
        result.auto_map = {name: f"{module}.{classes[name].__name__}" for name in names}
    result.architectures = [auto_class._model_mapping[type(result)].__name__]
    return result


def is_plain(config: PreTrainedConfig) -> bool:
    """Whether the stock class loads a model with this config."""
    return not config.model_type.startswith(PRUNED_PREFIX)


def _dropped(widths: Sequence[BlockWidths]) -> list[int]:
    """Indices of the blocks that are left out; () are the widths of one that stays as it is."""
    return [index for index, width in enumerate(widths) if width and is_dropped(width)]


def _kept_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Values of a config that hold for the pruned model too."""
    values = config.to_dict()
    for key in _STALE_KEYS:
        values.pop(key, None)
    # Layers for multi-token prediction are left out.
    return values | {key: 0 for key in ("num_nextn_predict_layers",) if values.get(key)}


def _pruned_text_config(
    config: Any, widths: Sequence[BlockWidths], uniform: bool
) -> PreTrainedConfig:
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    dropped = _dropped(widths)
    layers = [
        config_widths(config, index, width)
        for index, width in enumerate(widths)
        if index not in dropped
    ]
    values = without_layers(config, _kept_values(config), dropped)
    found = family_of(model_type).prunable_attention(config)
    is_rebuilt = found is not None and found[1].rebuilt
    if found and not is_rebuilt and not values.get("head_dim"):
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    if uniform:
        result = AutoConfig.for_model(model_type, **values | dict(ChainMap(*layers)))
        if is_rebuilt and result.num_attention_heads != config.num_attention_heads:
            raise UnsupportedModelError(
                f"the stock class of {model_type} builds {config.num_attention_heads} heads of "
                f"this size, not {result.num_attention_heads}",
                hint="leave out --uniform, or prune the original model: it keeps its heads then",
            )
        return result
    if values.get("output_router_logits"):  # their loss needs as many experts in all layers
        values["output_router_logits"] = False
    config_class = pruned_classes(model_type)["AutoConfig"]
    result = config_class(**values, per_layer_config=dict(enumerate(layers)))
    result.blocks_path = family_of(model_type).blocks
    if found and is_rebuilt:
        _state_attention(result, found[1])
    return result


def _state_attention(result: Any, attention: SublayerSpec) -> None:
    """State from what the modelling file builds attention, if heads are gone."""
    heads = {layer.num_attention_heads for layer in result.per_layer_config}
    if heads == {result.num_attention_heads}:
        return
    result.attention_output = f"{attention.module}.{attention.output}"
    if not hasattr(result, "head_dim"):  # vLLM takes it from the heads of one layer otherwise
        result.head_dim = result.hidden_size // result.num_attention_heads


def uniform_group_counts(config: PreTrainedConfig) -> list[int]:
    """Numbers of units of attention that a uniform model may keep.

    The stock config class decides: some classes refuse a number of heads that does not divide the
    hidden size, even if ``head_dim`` is given.

    Parameters
    ----------
    config : PreTrainedConfig
        Config of the dense model.
    """
    text, accepted = config.get_text_config(), []
    found = family_in(config).prunable_attention(text)
    if not found:
        return [1]
    before, attention = found  # in layers before, attention cannot be pruned
    counts = attention.counts(text.per_layer_config[before])
    whole = counts["head"] if counts["group"] == 1 else counts["group"]
    if attention.rebuilt:
        return [whole]
    for count in range(1, whole + 1):
        with contextlib.suppress(StrictDataclassError, ValueError):
            pruned_config(config, [*[()] * before, (count,)], uniform=True)
            accepted.append(count)
    return accepted


def add_older_keys(directory: Path) -> None:
    """Add the keys that transformers 4 reads to ``config.json``: of RoPE, and of experts.

    Parameters
    ----------
    directory : Path
        Directory with a ``config.json``. Those of RoPE are not added without ``rope_parameters``,
        or if there are several types of layers.
    """
    file = directory / "config.json"
    values = read_json(file)
    rope = dict(values.get("rope_parameters") or {})
    if rope and not any(isinstance(value, dict) for value in rope.values()):
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                values[key] = rope.pop(key)
        values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if (model_type := values.get("model_type")) in CONFIG_MAPPING:
        own = CONFIG_MAPPING[model_type].attribute_map.get("num_experts")
        if own in values:
            values["num_experts"] = values[own]
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_shards(
    directory: Path,
    tensors: dict[str, Tensor],
    read: Callable[[str], Tensor],
    max_shard_size: int,
) -> None:
    """Write the weights of a model as one or more safetensors files, with an index if needed.

    Parameters
    ----------
    directory : Path
        Output directory.
    tensors : dict
        Tensors by name, for their shapes and dtypes; may be on the meta device.
    read : callable
        Returns the values of a tensor by name.
    max_shard_size : int
        Largest size of a file in bytes; a file with a single larger tensor may exceed it.
    """
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name] for name in names}
        write_file(directory / file, shard, _METADATA, read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def shard_bytes(tensors: dict[str, Tensor], max_shard_size: int) -> list[int]:
    """Sizes of the safetensors files that `write_shards` writes."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    return [
        file_bytes({name: tensors[name] for name in names}, _METADATA)
        for names in split.filename_to_tensors.values()
    ]


def config_widths(config: Any, index: int, kept: BlockWidths) -> dict[str, int]:
    """Config entries of a block that keeps fewer units.

    Parameters
    ----------
    config : PreTrainedConfig
        Config of the dense model.
    index : int
        Index of the block.
    kept : BlockWidths
        Units that the block keeps, by sublayer.

    Returns
    -------
    dict
        Widths by config key, e.g. ``{"num_key_value_heads": 2, …}``.
    """
    before, widths = config.per_layer_config[index], {}
    specs = family_of(config.model_type).layer(config, index)
    for spec, width in zip(specs, kept, strict=False):
        if spec.widths:
            widths |= _sublayer_widths(before, spec, written_width(width))
    return widths


def _sublayer_widths(config: Any, spec: SublayerSpec, width: Width) -> dict[str, int]:
    """Config entries of a sublayer that keeps fewer units, by config key."""
    keys: dict[str, str] = {k: config.attribute_map.get(v, v) for k, v in spec.widths.items()}
    if "expert" in keys:
        channels = getattr(config, keys["channel"]) if "channel" in keys else 0
        kept = (width, channels) if isinstance(width, int) else width
        return {keys[kind]: number for kind, number in zip(keys, kept, strict=False)}
    if isinstance(width, int) and "channel" in keys:
        return {keys["channel"]: width}
    counts = spec.counts(config)
    groups, heads = counts["group"], counts["head"]
    if isinstance(width, int) and groups == 1:  # then the units are query heads
        groups, heads = 1, width
    else:
        groups, per_group = (width, heads // groups) if isinstance(width, int) else width
        heads = groups * per_group
    left = {"group": groups, "head": heads}
    return {key: left[kind] for kind, key in keys.items()}
