"""Validate a model's JSON files before transformers builds anything from them."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slimgpt.errors import ConfigError, UnsupportedModelError
from slimgpt.models.family import PRUNED_PREFIX, WRAPPER_TYPES, family_of
from slimgpt.runtime.files import read_json

MAX_DEPTH = 20  # of nested JSON; the libraries traverse it recursively

# Far beyond any existing model; a config cannot request absurd sizes.
_Layers = Annotated[int, Field(ge=1, le=1024)]

_Size = Annotated[int, Field(ge=1, le=2**24)]

_Length = Annotated[int, Field(ge=1, le=2**31 - 1)]

_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]

_Experts = Annotated[int, Field(ge=1, le=2**16)]

_Width = Annotated[int, Field(ge=0, le=2**24)]

_Share = Annotated[float, Field(ge=0, le=1)]

_Number = Annotated[float, Field(gt=0, le=1e30)]

_TokenIds = int | list[int] | None

_CONFIG_HINT = "correct config.json, or take the one that came with the model"

# Keys by which a config makes transformers read files that were not checked.
_REDIRECTIONS = ("transformers_weights", "configuration_files")

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Rope(_Checked):
    """RoPE parameters, in the new or the old form."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Number | None = None
    factor: _Number | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    original_max_position_embeddings: _Length | None = None
    attention_factor: _Number | None = None
    beta_fast: _Number | None = None
    beta_slow: _Number | None = None
    low_freq_factor: _Number | None = None
    high_freq_factor: _Number | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: list[_Number] | None = None
    long_factor: list[_Number] | None = None


class _ModelConfig(_Checked):
    """The keys of a ``config.json`` on which SlimGPT and the supported models depend.

    Not all model types have those with a default; where one is given, it may not be null.
    """

    model_type: str
    architectures: list[str] | None = None
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size = 1
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    attention_output: str | None = None
    hidden_act: str = "silu"
    max_position_embeddings: _Length
    initializer_range: _Share = 0.0
    rms_norm_eps: _Share = 0.0
    layer_norm_eps: _Share = 0.0
    residual_multiplier: _Number = 1.0
    attention_dropout: _Share | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    rope_theta: _Number | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    use_sliding_window: bool | None = None
    sliding_window: _Count | None = None  # 0 for none, in Qwen 2 mixtures
    max_window_layers: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    layer_types: list[str] | None = None
    num_experts: _Experts | None = None
    num_local_experts: _Experts | None = None
    n_routed_experts: _Experts | None = None
    num_experts_per_tok: _Experts | None = None
    moe_intermediate_size: _Size | None = None
    shared_expert_intermediate_size: _Size | None = None
    n_shared_experts: _Count | None = None
    n_group: _Experts | None = None
    topk_group: _Experts | None = None
    first_k_dense_replace: _Count | None = None
    decoder_sparse_step: _Length | None = None
    mlp_only_layers: list[_Count] | None = None
    num_nextn_predict_layers: _Count | None = None
    bos_token_id: _TokenIds = None
    eos_token_id: _TokenIds = None
    pad_token_id: int | None = None
    num_labels: Annotated[int, Field(ge=0, le=2**16)] | None = (
        None  # transformers lists them one by one
    )
    per_layer_config: dict[str, dict[str, _Width]] | None = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None


class _TokenNumbers(_Checked):
    """The keys of a ``generation_config.json`` that name tokens."""

    bos_token_id: _TokenIds = None
    eos_token_id: _TokenIds = None
    pad_token_id: int | None = None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object, and check that it is not nested too deeply.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not a JSON object, or is nested too deeply.
    """
    values = read_json(file)
    level, depth = [values], 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ConfigError(
            f"cannot read {file}: it is nested more than {MAX_DEPTH} levels deep",
            hint="the file is broken: write it again, or remove it",
        )
    return values


def explain(error: ValidationError) -> str:
    """Format the first problems that pydantic found, each with its key."""
    problems = dict.fromkeys(map(_problem, error.errors(include_url=False)))
    return "; ".join(list(problems)[:10])


def check_model_config(model: str, values: Mapping[str, Any], hint: str = _CONFIG_HINT) -> None:
    """Check the content of a ``config.json``, or the equivalent from a GGUF file.

    Parameters
    ----------
    model : str
        Its name, for error messages.
    values : dict
        The content.
    hint : str
        Hint of the error for wrong values.

    Raises
    ------
    ConfigError
        If values have the wrong type, are out of bounds, or contradict each other; names them all.
    UnsupportedModelError
        If the family is not supported, or the model is quantised or needs remote code.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        found = "is missing" if model_type is None else f"is {model_type!r}, not a name"
        raise ConfigError(
            f"the config of {model}: model_type {found}",
            hint="take the config.json that came with the model",
        )
    if model_type.removeprefix(PRUNED_PREFIX) in WRAPPER_TYPES:
        for part in (values, *values.values()):
            if isinstance(part, dict):
                _check_no_code(model, part)
        check_model_config(f"the text model in {model}", _text_values(model, values), hint)
        return
    family_of(model_type)
    _check_no_code(model, values)
    config_class = CONFIG_MAPPING[model_type]
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    defaults = {key: value for key, value in fields.items() if value is not dataclasses.MISSING}
    effective = defaults | dict(values)
    renamed = config_class.attribute_map.items()  # GPT-2 calls hidden_size n_embd
    effective |= {key: effective[own] for key, own in renamed if own in effective}
    problems = list(_foreign_keys(config_class, fields, values))
    try:
        _ModelConfig.model_validate(effective)
    except ValidationError as err:
        problems.append(explain(err))
    problems += _contradictions(effective)
    if problems:
        raise ConfigError(
            f"the config of {model} is wrong: {'; '.join(problems)}",
            hint=hint,
        )


def check_generation_config(model: str, values: Mapping[str, Any], vocab_size: int) -> None:
    """Check the token ids in a ``generation_config.json``.

    Raises
    ------
    ConfigError
        If they are not tokens of the model.
    """
    try:
        _TokenNumbers.model_validate(values)
        problems = list(_tokens_beyond(values, vocab_size))
    except ValidationError as err:
        problems = [explain(err)]
    if problems:
        raise ConfigError(
            f"the generation config of {model} is wrong: {'; '.join(problems)}",
            hint="correct generation_config.json, or remove it",
        )


def _text_values(model: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model inside; Qwen's older checkpoints have its keys at the top."""
    text_class = type(CONFIG_MAPPING[values["model_type"]]().get_text_config())
    text = values.get("text_config")
    if text is None:
        keys = {field.name for field in dataclasses.fields(text_class)} | {"rope_scaling"}
        text = {key: value for key, value in values.items() if key in keys}
    if not isinstance(text, dict):
        raise ConfigError(
            f"the config of {model}: text_config is {_short(text)}, not an object",
            hint=_CONFIG_HINT,
        )
    return {"model_type": text_class.model_type} | text


def _problem(problem: Mapping[str, Any]) -> str:
    # For a union, pydantic also names the member, which is not a key.
    key = ".".join(str(part) for part in problem["loc"] if part not in ("int", "list[int]"))
    if problem["type"] == "missing":
        return f"{key} is missing"
    return f"{key}={_short(problem['input'])}: {problem['msg']}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_no_code(model: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        name = key.removeprefix("_").removesuffix("_internal")
        built_in = (
            None,
            "eager",
            "grouped_mm",
            "batched_mm",
            *ALL_ATTENTION_FUNCTIONS.valid_keys(),
        )
        if name in _IMPLEMENTATIONS and value not in built_in:
            raise UnsupportedModelError(
                f"the config of {model} has {key}={_short(value)}, which is not part of "
                "transformers but remote code, which is never run",
                hint=f"remove {key} from config.json",
            )
    if quantised := values.get("quantization_config") or values.get("compression_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UnsupportedModelError(
            f"{model} is quantised{f' ({_short(method)})' if method else ''}, and quantised "
            "weights cannot be solved for (quantization_config in its config)",
            hint="prune the original model, and quantise the result; or load this one with "
            "transformers, dequantise it (model.dequantize()) and save it",
        )
    for key in _REDIRECTIONS:
        if key in values:
            raise UnsupportedModelError(
                f"the config of {model} has {key}={_short(values[key])}: only the "
                "standard files are read",
                hint=f"remove {key} from config.json",
            )


def _foreign_keys(
    config_class: Any, fields: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[str]:
    """Find keys that would overwrite attributes of the config class."""
    for key in values:
        found = getattr(config_class, key, None)
        settable = isinstance(found, property) and found.fset is not None
        if key not in (*fields, "model_type") and hasattr(config_class, key) and not settable:
            yield f"{key} is not a valid config key"


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """Find contradictions between values that are valid by themselves."""
    hidden, heads, groups, layers, vocab_size = (
        _count(values.get(key))
        for key in (
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "num_hidden_layers",
            "vocab_size",
        )
    )
    if heads and groups and heads % groups:
        yield f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
    if heads and hidden and hidden % heads and not values.get("head_dim"):
        yield f"hidden_size={hidden} is no multiple of num_attention_heads={heads}"
    if isinstance(act := values.get("hidden_act"), str) and act not in ACT2FN:
        yield f"hidden_act={_short(act)} is unknown to transformers"
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := values.get(key), dict):
            kind = rope.get("rope_type") or rope.get("type") or "default"
            known = ("default", "mrope", *ROPE_INIT_FUNCTIONS)
            if isinstance(kind, str) and kind not in known:
                yield f"{key}.rope_type={_short(kind)} is unknown to transformers"
    experts = [
        _count(values.get(k)) for k in ("num_experts", "num_local_experts", "n_routed_experts")
    ]
    num_experts, used = next(filter(None, experts), None), _count(values.get("num_experts_per_tok"))
    if num_experts and used and used > num_experts:
        yield f"num_experts_per_tok={used}, but there are {num_experts} experts"
    if num_experts:
        yield from _wrong_groups(values, num_experts, used or 1)
    if vocab_size:
        yield from _tokens_beyond(values, vocab_size)
    if layers and isinstance(widths := values.get("per_layer_config"), dict):
        yield from _wrong_widths(widths, values["model_type"], layers)


def _wrong_groups(values: Mapping[str, Any], num_experts: int, used: int) -> Iterator[str]:
    """Find groups of experts in which the router cannot choose."""
    groups, chosen = (_count(values.get(key)) for key in ("n_group", "topk_group"))
    needs = values["model_type"].removeprefix(PRUNED_PREFIX) in ("deepseek_v3", "glm4_moe")
    if needs and not (groups and chosen):
        yield f"n_group={values.get('n_group')} and topk_group={values.get('topk_group')}"
    if not groups:
        return
    if num_experts % groups:
        yield f"n_group={groups} does not divide the {num_experts} experts"
    elif groups > 1 and num_experts < 2 * groups:
        yield f"n_group={groups}, but there are {num_experts} experts, less than 2 in each group"
    elif chosen and (chosen > groups or used > chosen * num_experts // groups):
        yield f"topk_group={chosen} of {groups} groups has not {used} experts"


def _tokens_beyond(values: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = values.get(key)
        for token in found if isinstance(found, list) else [found]:
            is_none = token is None or (key == "pad_token_id" and token == -1)
            if not is_none and isinstance(token, int) and not 0 <= token < vocab_size:
                yield f"{key}={token}, but the vocabulary has tokens 0 to {vocab_size - 1}"


def _wrong_widths(layers: Mapping[str, Any], model_type: str, num_layers: int) -> Iterator[str]:
    family = family_of(model_type)
    renamed = CONFIG_MAPPING[model_type.removeprefix(PRUNED_PREFIX)].attribute_map
    keys = [key for spec in family.sublayers for key in spec.widths.values()]
    known = {renamed.get(key, key) for key in keys}
    experts = {renamed.get(key, key) for key in family.widths("experts")}
    attention = {
        tuple(spec.widths.values())
        for spec in family.sublayers
        if len(spec.widths) == 2 and spec.kind == "attention"
    }
    for index, widths in layers.items():
        key = f"per_layer_config.{index}"
        if not (index.isdecimal() and int(index) < num_layers):
            yield f"{key}: the layers are 0 to {num_layers - 1}"
        if not isinstance(widths, dict):
            continue  # already reported
        if strangers := sorted({*widths} - known):
            yield f"{key}: {', '.join(strangers)} cannot differ between layers"
        if any(value == 0 for key, value in widths.items() if key in experts):
            yield f"{key}: a layer has no experts, or experts without channels"
        for names in attention:
            groups, heads = (_count(widths.get(name)) for name in names)
            if groups and heads and heads % groups:
                yield f"{key}: {names[1]}={heads} is no multiple of {groups} key/value heads"


def _count(value: Any) -> int | None:
    """Return the value if it is a positive integer, else None."""
    return value if type(value) is int and value > 0 else None
