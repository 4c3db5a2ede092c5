"""Pruned models in vLLM.

Only vLLM imports this module, when it loads an architecture registered by
`slimgpt.checkpoint.registration.register_with_vllm`.
"""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.transformers import TransformersForCausalLM as StockBackend
from vllm.model_executor.models.transformers import TransformersMoEForCausalLM as StockMoEBackend
from vllm.model_executor.models.utils import extract_layer_index

from slimgpt.models.family import PRUNED_PREFIX


class SlimForCausalLM(LlamaForCausalLM):
    """Pruned LLaMA, Mistral, Qwen2 or Qwen3: layer ``i`` is built from ``per_layer_config[i]``.

    The four differ only in their decoder layers. vLLM's Qwen2 layer derives ``head_dim`` from the
    number of heads, which pruning changes, so LLaMA's layer is used instead.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_decoder_layer)


def _decoder_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    index = extract_layer_index(prefix)
    config = vllm_config.model_config.hf_config.per_layer_config[index]
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    if model_type == "qwen3":
        slides = config.layer_types[index] == "sliding_attention"
        return Qwen3DecoderLayer(
            config,
            vllm_config.cache_config,
            vllm_config.quant_config,
            prefix=prefix,
            per_layer_sliding_window=config.sliding_window if slides else None,
        )
    if model_type == "qwen2":
        config.qkv_bias = True  # always true in Qwen2, so its config has no such key
    return LlamaDecoderLayer(vllm_config, prefix, config)


class TransformersForCausalLM(StockBackend):
    """Pruned model in vLLM's Transformers backend, which vLLM knows by the name of its class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _state_logit_scale(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class TransformersMoEForCausalLM(StockMoEBackend):
    """Pruned mixture of experts in the same backend.

    vLLM gives the experts of all layers the original width. The rest of a narrower expert, which
    the checkpoint does not fill, must be zero.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _state_logit_scale(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for experts in self.moe_layers:
            for parameter in experts.parameters():
                parameter.data.zero_()


def _state_logit_scale(vllm_config: VllmConfig) -> None:
    """Give the factor of Granite's logits under the key that the backend reads."""
    config = vllm_config.model_config.hf_text_config
    if divisor := getattr(config, "logits_scaling", None):
        config.logit_scale = 1 / divisor
