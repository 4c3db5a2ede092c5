"""Where the text model is in a checkpoint: by itself, or inside a model that also sees images.

Everything but the text model is copied unchanged, and the same auto class loads the result.
"""

from typing import Any, NamedTuple

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from slimgpt.errors import UnsupportedModelError
from slimgpt.models.family import Family, family_of


def is_wrapped(config: PreTrainedConfig) -> bool:
    """Whether the text model is inside another one, and its config inside this one."""
    return config.get_text_config() is not config


def family_in(config: PreTrainedConfig) -> Family:
    """Find the family of the text model; raises the same errors as `family_of`."""
    return family_of(config.get_text_config().model_type)


def auto_class_of(config: PreTrainedConfig) -> Any:
    """Choose the auto class that loads a checkpoint: by its architecture, else by its config."""
    if _architecture(config).endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if is_wrapped(config) else AutoModelForCausalLM


def has_language_head(config: PreTrainedConfig) -> bool:
    """Whether the model predicts tokens."""
    return auto_class_of(config) is not AutoModelForSequenceClassification


def check_language_head(model: str, config: PreTrainedConfig) -> None:
    """Check that a model predicts tokens.

    Raises
    ------
    UnsupportedModelError
        If it classifies texts.
    """
    if not has_language_head(config):
        raise UnsupportedModelError(
            f"{model} is a {_architecture(config)}, which has no head for language modelling",
            hint="such a model can be pruned and inspected; for all else load it with transformers",
        )


def check_causal(model: str, config: PreTrainedConfig) -> None:
    """Check that a model reads and predicts tokens, and nothing else.

    Raises
    ------
    UnsupportedModelError
        If it classifies texts, or its text model is inside another one.
    """
    check_language_head(model, config)
    if is_wrapped(config):
        raise UnsupportedModelError(
            f"{model} is a {_architecture(config)}, a text model and a vision tower: only text "
            "models by themselves can be exported",
            hint="serve the checkpoint itself; if it was pruned with --uniform, other engines and "
            "their converters read it like the original",
        )


def decoder_name(model: Any) -> str:
    """Path of the text decoder in a model."""
    if not is_wrapped(model.config):
        return family_in(model.config).decoder
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


class NativeName(NamedTuple):
    """What a tensor of a checkpoint is in the model.

    Attributes
    ----------
    name : str
        Name of the tensor, or of the one that is made from it and others.
    converter : WeightConverter or None
        Makes it, in transformers.
    pattern : str or None
        Which input of the converter the tensor is.
    """

    name: str
    converter: WeightConverter | None
    pattern: str | None


def native_names(model: Any, names: list[str]) -> dict[str, NativeName]:
    """Find what tensors of a checkpoint are called in the model.

    Parameters
    ----------
    model : PreTrainedModel
        The model, with or without weights.
    names : list of str
        Names in the checkpoint. transformers renames some as it loads them.

    Returns
    -------
    dict
        The names in the model, by those in the checkpoint.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    found, state = {}, model.state_dict()
    for name in names:
        native, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        found[name] = NativeName(native, by_pattern[pattern] if pattern else None, pattern)
    return found


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [""])[0]
