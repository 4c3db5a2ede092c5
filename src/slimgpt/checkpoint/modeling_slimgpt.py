"""Language models whose decoder layers differ in width.

This file travels with every checkpoint of non-uniform width that SlimGPT writes. It is the same
file for all of them and needs only torch and transformers (5.16 or newer). Where a stock class is
called ``LlamaForCausalLM``, ``SlimLlamaForCausalLM`` is the same code with layer ``i`` built from
``config.per_layer_config[i]``, which records that layer's number of heads and its FFN width. The
global values of the config remain those of the original model. If ``config.attention_output`` is
given, the stock class takes the size of a head from the hidden size, and attention with fewer heads
is that of a narrower model between the same hidden states. In a model that also sees images,
all this holds for the text model inside, with its ``config.text_config``.
"""

import copy
import sys
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, PreTrainedConfig
from transformers.integrations.heterogeneity import HeterogeneousConfigMixin
from transformers.pytorch_utils import Conv1D

PREFIX, TYPE_PREFIX = "Slim", "slimgpt_"


class _SlimConfig:
    """Config mixin: reading a global width is allowed and returns the original model's width."""

    allow_global_per_layer_attribute_access = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Make the config of a text model inside, if there is one."""
        text = getattr(self, "text_config", None)
        if isinstance(text, dict) and text["model_type"].startswith(TYPE_PREFIX):
            stock = CONFIG_MAPPING[text["model_type"].removeprefix(TYPE_PREFIX)]
            self.text_config = _pruned_class(stock)(**text)
        super().__post_init__(**kwargs)

    def __getattribute__(self, key: str) -> Any:
        # The stock lookup without its warning that layers may differ from the global value.
        lookup = super(HeterogeneousConfigMixin, self).__getattribute__
        return lookup(lookup("attribute_map").get(key, key))

    def validate_architecture(self) -> None:
        """Accept a number of heads that does not divide ``hidden_size``: ``head_dim`` is given."""


class _SlimModel:
    """Model mixin: each decoder layer is built from its own config."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        layer_class, text = type(self._blocks[0]), self._decoder.config
        layers = (_layer(layer_class, text, i) for i in range(text.num_hidden_layers))
        self._decoder.set_submodule(self._blocks_path, nn.ModuleList(layers))
        self.post_init()

    @property
    def _decoder(self) -> nn.Module:
        is_inside = self.config.get_text_config() is not self.config
        return self.get_decoder() if is_inside else self.base_model

    @property
    def _blocks_path(self) -> str:
        return getattr(self._decoder.config, "blocks_path", "layers")  # absent in SlimGPT 0.1

    @property
    def _blocks(self) -> nn.ModuleList:
        return self._decoder.get_submodule(self._blocks_path)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        stock = next(c for c in cls.__mro__ if c.__module__.startswith("transformers.models."))
        return stock._can_set_experts_implementation()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Switch the attention implementation, in the layers' own configs too."""
        super().set_attn_implementation(*args, **kwargs)
        self._switch("_attn_implementation_internal")

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Switch the implementation of experts, in the layers' own configs too."""
        super().set_experts_implementation(*args, **kwargs)
        self._switch("_experts_implementation_internal")

    def _switch(self, key: str) -> None:
        for module in self._blocks.modules():
            if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
                setattr(config, key, getattr(self._decoder.config, key))


def _layer(layer_class: Any, text: Any, index: int) -> nn.Module:
    """Build a layer of a text model; if need be, with the attention of a narrower model."""
    config = text.per_layer_config[index]
    path, heads = getattr(text, "attention_output", None), config.num_attention_heads
    if path is None or heads == text.num_attention_heads:
        return layer_class(config, index)
    # The stock class takes the size of a head from the hidden size.
    whole, narrow = copy.copy(config), copy.copy(config)
    whole.num_attention_heads = text.num_attention_heads
    narrow.hidden_size = text.hidden_size // text.num_attention_heads * heads
    layer, (name, _, output) = layer_class(whole, index), path.rpartition(".")
    attention = type(layer.get_submodule(name))(narrow, layer_idx=index)
    for module in attention.modules():
        if isinstance(module, nn.Linear | Conv1D):
            _widen(module, text.hidden_size, module is attention.get_submodule(output))
    layer.set_submodule(name, attention)
    return layer


def _widen(linear: Any, hidden_size: int, is_output: bool) -> None:
    """Give a linear layer the hidden size as its output or input, with new parameters."""
    shape, is_transposed = list(linear.weight.shape), isinstance(linear, Conv1D)
    shape[int(is_output == is_transposed)] = hidden_size
    linear.weight = nn.Parameter(linear.weight.new_empty(shape))
    if is_output and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.new_empty(hidden_size))
    if is_transposed:
        linear.nx, linear.nf = shape
    else:
        linear.out_features, linear.in_features = shape


def _pruned_class(stock: type) -> Any:
    return getattr(sys.modules[__name__], PREFIX + stock.__name__)


def __getattr__(name: str) -> type:
    """Make ``Slim<Stock>`` from the stock class of that name in transformers, on first use."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = sys.modules[__name__]
    if issubclass(stock, PreTrainedConfig):
        bases: tuple[type, ...] = (_SlimConfig, stock)
        body = {"model_type": TYPE_PREFIX + stock.model_type}
    else:
        bases = (_SlimModel, stock)
        body = {"config_class": _pruned_class(stock.config_class)}
    cls = type(name, bases, {"__module__": __name__, "__doc__": stock.__doc__, **body})
    setattr(module, name, cls)
    if stock in MODEL_MAPPING:  # stock classes with a head make their text model by AutoModel
        AutoModel.register(cls, _pruned_class(MODEL_MAPPING[stock]), exist_ok=True)
    return cls
