"""Register pruned models with transformers and vLLM, so that they load without remote code.

``import slimgpt`` arranges that `register` runs once transformers is imported, whichever comes
first (see ``slimgpt/__init__.py``). This module can therefore run while another one is importing
transformers, so its functions import from transformers themselves.
"""

from typing import Any

from slimgpt.models.family import WRAPPER_TYPES, load_families

# Model types whose decoder layers `slimgpt.checkpoint.modeling_vllm` builds from vLLM's own.
# The others run on vLLM's Transformers backend.
VLLM_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def pruned_classes(model_type: str) -> dict[str, Any]:
    """Classes of a pruned model, by the auto class that loads them.

    Parameters
    ----------
    model_type : str
        Type of the original model, e.g. ``llama``.
    """
    from transformers import CONFIG_MAPPING

    from slimgpt.checkpoint import modeling_slimgpt

    stock_config = CONFIG_MAPPING[model_type]
    stock = {"AutoConfig": stock_config}
    for auto_class in _auto_classes():
        stock_class = auto_class._model_mapping.get(stock_config, None)
        if stock_class and stock_class.config_class is stock_config:  # not the text model by itself
            stock[auto_class.__name__] = stock_class
    prefix = modeling_slimgpt.PREFIX
    return {auto: getattr(modeling_slimgpt, prefix + cls.__name__) for auto, cls in stock.items()}


def _auto_classes() -> tuple[Any, ...]:
    import transformers

    return (
        transformers.AutoModel,
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
    )


def register() -> None:
    """Register the pruned models of every family, and those that have one inside."""
    from transformers import AutoConfig

    for model_type in (*load_families(), *WRAPPER_TYPES):
        classes = pruned_classes(model_type)
        config_class = classes["AutoConfig"]
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in _auto_classes():
            if model_class := classes.get(auto_class.__name__):
                auto_class.register(config_class, model_class, exist_ok=True)
        for auto_name, pruned_class in classes.items():
            # With its auto class known, save_pretrained brings the modelling file along.
            pruned_class.register_for_auto_class(auto_name)


def register_with_vllm() -> None:
    """Register pruned models with vLLM, which calls this function as a plugin."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    for model_type, family in load_families().items():
        if model_class := pruned_classes(model_type).get("AutoModelForCausalLM"):
            if model_type in VLLM_MODEL_TYPES:
                name = "SlimForCausalLM"
            elif any(spec.kind == "experts" for spec in family.sublayers):
                name = "TransformersMoEForCausalLM"
            else:
                name = "TransformersForCausalLM"
            ModelRegistry.register_model(
                model_class.__name__, f"slimgpt.checkpoint.modeling_vllm:{name}"
            )
