"""A tiny config of every model type: grouped queries and biases where the family has them."""

from typing import Any

import transformers
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
)

from slimgpt.models.family import NEWEST_ONLY, TESTED_VERSIONS, load_families

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}

_COMMON = {
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}

_NO_GROUPS = {"head_dim": None, "num_key_value_heads": None}

_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}

_EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2}

# One layer of three has no experts.
_FINE_EXPERTS = _EXPERTS | {"moe_intermediate_size": 16, "mlp_only_layers": [1]}

_GROUPED_EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# Attention through low-rank projections.
_LATENT = {
    "num_key_value_heads": 8,
    "head_dim": None,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

# What a model type has beside the common sizes. None leaves out a key that it lacks.
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "ministral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": _SLIDING | {"layer_types": _SLIDING["layer_types"][:3]},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": _SLIDING | {"layer_types": _SLIDING["layer_types"][:3]},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "olmo3": _SLIDING | {"layer_types": _SLIDING["layer_types"][:3]},
    "exaone4": _SLIDING | {"layer_types": _SLIDING["layer_types"][:3]},
    "cwm": _SLIDING | {"layer_types": _SLIDING["layer_types"][:3]},
    "falcon": _NO_GROUPS
    | {"intermediate_size": None, "ffn_hidden_size": 64, "num_kv_heads": 4}
    | {"new_decoder_architecture": True},
    "gpt_neox": _NO_GROUPS,
    "helium": {"hidden_size": 64},
    "gpt2": _NO_GROUPS | {"intermediate_size": None},
    "opt": _NO_GROUPS | {"intermediate_size": None, "ffn_dim": 64, "word_embed_proj_dim": 48},
    "stablelm": {"head_dim": None, "use_qkv_bias": True},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "mixtral": _EXPERTS,
    "qwen2_moe": _FINE_EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": _FINE_EXPERTS | {"norm_topk_prob": True},
    "olmoe": _EXPERTS | {"intermediate_size": 32, "head_dim": None},
    "granitemoe": _EXPERTS | {"residual_multiplier": 0.3, "embedding_multiplier": 2.0},
    "phimoe": _EXPERTS,
    "glm4_moe": _GROUPED_EXPERTS | {"partial_rotary_factor": 0.5},
    "deepseek_v2": _GROUPED_EXPERTS | _LATENT | {"topk_method": "greedy", "n_group": 1},
    "deepseek_v3": _GROUPED_EXPERTS | _LATENT,
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}

_OPTIONS["cwm"] = _OPTIONS["cwm"] | _OPTIONS["apertus"]

_REFUSED = NEWEST_ONLY if Version(transformers.__version__) < Version(TESTED_VERSIONS[1]) else ()

# Others are only found inside other models, see test_wrapped_models.py.
MODEL_TYPES = sorted(
    t
    for t in load_families()
    if CONFIG_MAPPING[t] in MODEL_FOR_CAUSAL_LM_MAPPING and t not in _REFUSED
)


def tiny_options(model_type: str) -> dict[str, Any]:
    """What a model type has beside the common sizes."""
    return _OPTIONS.get(model_type, {})


def tiny_config(model_type: str, **options: Any) -> PreTrainedConfig:
    values = _SIZES | _COMMON | tiny_options(model_type) | options
    return AutoConfig.for_model(model_type, **{k: v for k, v in values.items() if v is not None})
