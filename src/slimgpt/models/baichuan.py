"""Read checkpoints of Baichuan as what they compute: LLaMA. Their own code is never run.

Baichuan-7B is LLaMA whose query, key and value projections are stored as one. Baichuan2-7B also
normalises the rows of its output head whenever it uses them. The 13B models have ALiBi, which
LLaMA has not.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import CONFIG_NAME

from slimgpt.errors import UnsupportedModelError
from slimgpt.models.config_checks import read_object
from slimgpt.models.matching import HEAD
from slimgpt.models.source import Source, find_file
from slimgpt.models.stored import StoredTensor

# The classes of Baichuan-7B, and of Baichuan-13B and both sizes of Baichuan2.
_BAICHUAN1_7B, _OTHERS = "BaiChuanForCausalLM", "BaichuanForCausalLM"

_HIDDEN_SIZE_OF_13B = 5120

# What Baichuan's config and LLaMA's have in common; a quantised model is refused later.
_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "compression_config",
)

# Only changed code follows these keys.
_CHANGES = ("rope_theta", "rope_scaling", "rope_parameters", "num_key_value_heads", "head_dim")

_PACKED, _PARTS = ".self_attn.W_pack.", ("q_proj", "k_proj", "v_proj")


def read_baichuan(source: Source) -> dict[str, Any] | None:
    """Read the config of a checkpoint of Baichuan; None for other checkpoints.

    Raises
    ------
    ConfigError
        If it cannot be read, or the hub cannot be reached.
    """
    file = find_file(source, CONFIG_NAME)
    values = read_object(file) if file else {}
    return values if values.get("model_type") == "baichuan" else None


def llama_config(model: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the content of Baichuan's ``config.json`` into LLaMA's.

    Parameters
    ----------
    model : str
        Its name, for error messages.
    values : dict
        The content; it may be wrong in any way that `check_model_config` finds in the result.

    Raises
    ------
    UnsupportedModelError
        If the model computes anything else, or the config does not say what it computes.
    """
    found = values.get("architectures")
    if found not in ([_BAICHUAN1_7B], [_OTHERS]):
        raise UnsupportedModelError(
            f"the config of {model} has architectures={found!r}, so it is unknown which of the "
            "models of type 'baichuan' it is",
            hint=f'set "architectures" in config.json: ["{_BAICHUAN1_7B}"] for Baichuan-7B, '
            f'["{_OTHERS}"] for Baichuan2-7B',
        )
    is_13b = values.get("hidden_size") == _HIDDEN_SIZE_OF_13B
    if found == [_OTHERS] and (is_13b or "max_position_embeddings" not in values):
        sizes = ", ".join(
            f"{key}={values.get(key)}" for key in ("num_hidden_layers", "hidden_size")
        )
        raise UnsupportedModelError(
            f"{model} is a 13B model of Baichuan ({sizes}): its positions are ALiBi biases, not "
            "RoPE, so it is not LLaMA",
            hint="take Baichuan-7B or Baichuan2-7B, or a model of a type in `slimgpt families`",
        )
    if changed := [key for key in _CHANGES if values.get(key) is not None]:
        raise UnsupportedModelError(
            f"the config of {model} has {changed[0]}, which the code of Baichuan does not know: "
            "the model runs with changed code, and what that computes is unknown",
            hint=f"remove {changed[0]} from config.json if the model was trained without it",
        )
    context = {"max_position_embeddings": values.get("model_max_length", 4096)}
    own = {key: values[key] for key in _COMMON if key in values}
    is_tied = {"tie_word_embeddings": False} if _has_norm_head(values) else {}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **context,
        **own,
        **is_tied,
    }


def llama_tensors(
    model: str, values: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Name the tensors of a checkpoint of Baichuan as LLaMA does, and split the packed ones.

    Parameters
    ----------
    model : str
        Its name, for error messages.
    values : dict
        The content of its ``config.json``, which `llama_config` accepts.
    stored : dict
        From `read_headers`. Packed tensors have the rows of the queries, keys and values, from top
        to bottom, as many of each.

    Returns
    -------
    dict
        The tensors; like the stored ones, they are read when their values are needed.

    Raises
    ------
    UnsupportedModelError
        If the rows of a packed tensor cannot be split so.
    """
    result: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        prefix, packed, suffix = name.partition(_PACKED)
        if packed:
            rows = tensor.shape[0] if tensor.shape else 0
            if not rows or rows % len(_PARTS):
                raise UnsupportedModelError(
                    f"{model}: the tensor {name} has {rows} rows, which are not those of queries, "
                    "keys and values, as many of each",
                    hint="download or write the checkpoint again",
                )
            shape = (rows // len(_PARTS), *tensor.shape[1:])
            for index, part in enumerate(_PARTS):
                read = partial(_read_part, tensor, index)
                own = f"{prefix}.self_attn.{part}.{suffix}"
                result[own] = StoredTensor(read, shape, tensor.dtype)
        elif name == f"{HEAD}.weight" and _has_norm_head(values):
            read = partial(_read_normalised, tensor)
            result[name] = StoredTensor(read, tensor.shape, tensor.dtype)
        else:
            result[name] = tensor
    return result


def _has_norm_head(values: Mapping[str, Any]) -> bool:
    """Whether the model is Baichuan2: it normalises the rows of its output head."""
    return values.get("architectures") == [_OTHERS]


def _read_part(packed: StoredTensor, index: int) -> Tensor:
    return packed.read().chunk(len(_PARTS))[index].clone()  # a view would keep all parts in memory


def _read_normalised(head: StoredTensor) -> Tensor:
    return normalize(head.read())
