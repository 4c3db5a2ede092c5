"""Write a pruned model as a checkpoint that loads with stock tools."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_model
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimgpt import modeling_slimgpt
from slimgpt.families import PRUNED_PREFIX, config_widths, family_of
from slimgpt.registry import pruned_classes
from slimgpt.schedule import BlockWidths

MAX_SHARD_SIZE = "5GB"


def pruned_config(
    config: PreTrainedConfig, widths: Sequence[BlockWidths], uniform: bool
) -> PreTrainedConfig:
    """Config of the pruned model.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model before.
    widths : sequence of BlockWidths
        What each block has kept.
    uniform : bool
        All blocks have the same widths: the result is of the stock class.

    Returns
    -------
    PreTrainedConfig
        A new one. In a pruned layer ``head_dim`` no longer follows from the hidden size and the
        number of heads, so it is always stated.
    """
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    layers = [config_widths(config, index, width) for index, width in enumerate(widths)]
    values = config.to_dict()
    stale = ("model_type", "architectures", "auto_map", "per_layer_config", "_model_name_or_path")
    for key in stale:
        values.pop(key, None)
    if not values.get("head_dim"):
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    if uniform:
        result = AutoConfig.for_model(model_type, **values | layers[0])
    else:
        classes = pruned_classes(model_type)
        result = classes["AutoConfig"](**values, per_layer_config=dict(enumerate(layers)))
        module = modeling_slimgpt.__name__.rpartition(".")[2]
        result.auto_map = {auto: f"{module}.{cls.__name__}" for auto, cls in classes.items()}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(result)]
    result.architectures = [model_class.__name__]
    return result


def uniform_group_counts(config: PreTrainedConfig) -> list[int]:
    """Numbers of key/value groups that a uniform model may keep.

    The stock config class decides: some classes refuse a number of heads that does not divide the
    hidden size, even where ``head_dim`` is given.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model before.
    """
    family, first = family_of(config.model_type), config.per_layer_config[0]
    num_groups = getattr(first, family.attention.widths[0])
    num_channels = getattr(first, family.ffn.widths[0])
    accepted = []
    for count in range(1, num_groups + 1):
        kept = BlockWidths(count, num_channels)
        with contextlib.suppress(StrictDataclassError, ValueError):
            pruned_config(config, [kept], uniform=True)
            accepted.append(count)
    return accepted


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    directory: Path,
) -> None:
    """Write weights, config, generation config, tokenizer and, where needed, the modelling file.

    Parameters
    ----------
    model : PreTrainedModel
        The pruned model; its class and config may still be those of the original.
    tokenizer : PreTrainedTokenizerBase
        Of the original.
    config : PreTrainedConfig
        From `pruned_config`.
    directory : Path
        Exists; what is there already stays.
    """
    config.dtype = model.dtype
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_torch_model(
        model,
        directory,
        max_shard_size=MAX_SHARD_SIZE,
        shared_tensors_to_discard=list(model.all_tied_weights_keys),
    )
