"""Load a checkpoint: its config, its weights, or a skeleton without weights."""

import copy
import logging
import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)
from transformers.utils.hub import get_checkpoint_shard_files
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from slimgpt.errors import ConfigError, DataError, UnsupportedModelError
from slimgpt.models.baichuan import llama_config, llama_tensors, read_baichuan
from slimgpt.models.config_checks import check_generation_config, check_model_config, read_object
from slimgpt.models.device import find_device
from slimgpt.models.family import family_of
from slimgpt.models.gguf_reading import (
    BROKEN_GGUF,
    GGUFContent,
    complete_config,
    quick_loading,
    read_gguf,
)
from slimgpt.models.layout import auto_class_of, check_language_head, family_in
from slimgpt.models.matching import fit_tensors, incomplete, match_config, unused
from slimgpt.models.source import CONVERT_PICKLES, Source, adapter_error, find_file
from slimgpt.models.stored import (
    LOAD_ERRORS,
    StoredTensor,
    cannot_load,
    loading,
    read_headers,
    read_index,
)

log = logging.getLogger(__name__)


def load_config(source: Source) -> PreTrainedConfig:
    """Read the config of a checkpoint.

    Raises
    ------
    ConfigError
        If it cannot be read, its values are wrong, or the hub cannot be reached.
    UnsupportedModelError
        If the family is not supported, the model is quantised or an adapter or needs remote code,
        or the weights in a local directory have another number of blocks.
    """
    content, translated = gguf_content(source), None
    if not source.gguf_file:
        if source.directory is None and find_file(source, ADAPTER_CONFIG_NAME):
            raise adapter_error(source.name, ADAPTER_CONFIG_NAME)
        if file := find_file(source, CONFIG_NAME):
            if baichuan := read_baichuan(source):
                translated = llama_config(source.name, baichuan)
            check_model_config(source.name, translated or read_object(file))
    try:
        with quick_loading() if content else nullcontext():
            config = (
                LlamaConfig.from_dict(translated)
                if translated
                else AutoConfig.from_pretrained(
                    source.location, trust_remote_code=False, **source.kwargs
                )
            )
    except LOAD_ERRORS as err:
        found = re.search(r"GGUF model with architecture (\S+) is", str(err))
        if found:
            family_of(found[1])
        raise cannot_load(f"the config of {source.name}", err) from err
    family_in(config)
    if content:
        with loading(f"the config of {source.name}"):
            complete_config(config, content)
        check_model_config(source.name, config.to_dict(), hint=BROKEN_GGUF)
    if source.directory:
        with suppress(ConfigError):  # unreadable files may not be needed
            read_stored(source, config)
    return config


def weight_files(source: Source) -> list[Path]:
    """Find the weight files of a checkpoint, in the hub's cache if it is not local.

    They are ``model.safetensors``, or the files named in the index. Other safetensors
    files are ignored, as in transformers. Every command reads these files.

    Raises
    ------
    ConfigError
        If they are missing, or the hub cannot be reached.
    UnsupportedModelError
        If there are both, or the index names files outside the directory.
    """
    if source.gguf_file:
        return [Path(source.location, source.gguf_file)]
    single, index = (find_file(source, n) for n in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    shards = read_index(index) if index else set()
    if single and shards - {SAFE_WEIGHTS_NAME}:
        raise UnsupportedModelError(
            f"{source.name} has two sets of weights: {SAFE_WEIGHTS_NAME}, and {len(shards)} files "
            f"that {SAFE_WEIGHTS_INDEX_NAME} names, first {min(shards)}",
            hint="remove one of them: the single file, or the index with its files",
        )
    if single:
        return [single]
    if not index or not shards:
        raise ConfigError(
            f"{source.name} has no {SAFE_WEIGHTS_NAME}, and no {SAFE_WEIGHTS_INDEX_NAME} that "
            "names other files",
            hint="the weights have these names where a model was saved with save_pretrained; if it "
            f"has pytorch_model.bin, {CONVERT_PICKLES}",
        )
    with loading(f"the weights of {source.name}"):
        return [Path(file) for file in get_checkpoint_shard_files(source.location, index)[0] or ()]


def read_stored(source: Source, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """Find the tensors in the safetensors files of a checkpoint; values are read later.

    Raises
    ------
    ConfigError
        If a file is missing or broken, or the hub cannot be reached.
    UnsupportedModelError
        If the tensors are quantised or contradict the config.
    """
    stored = read_headers(source.name, weight_files(source))
    if baichuan := read_baichuan(source):
        stored = llama_tensors(source.name, baichuan, stored)
    return match_config(source.name, stored, config)


def load_model(source: Source, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a model that predicts tokens, with its weights, from safetensors or GGUF only.

    Parameters
    ----------
    source : Source
        From `find_model`.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        ``auto`` is that of the checkpoint, float32 for GGUF.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises
    ------
    ConfigError
        If the checkpoint cannot be read, or the device does not exist.
    UnsupportedModelError
        If the family is not supported, the model has no head for language modelling, or weights
        are missing, unused or not finite.
    """
    config = load_config(source)
    check_language_head(source.name, config)
    target = find_device(device)
    stored: dict[str, StoredTensor] = {}
    if not source.gguf_file:
        stored = fit_tensors(source.name, read_stored(source, config), build_skeleton(config))
    start = time.monotonic()
    log.info("loading %s", source.name)
    wanted: str | torch.dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded: Any
    quick = quick_loading() if source.gguf_file else nullcontext()
    with loading(f"the weights of {source.name}"), quick:
        loaded = _loader(source, config, stored)(
            config=config,
            dtype=torch.float32 if source.gguf_file else wanted,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, details = loaded
    if problems := [*details["missing_keys"], *details["mismatched_keys"]]:
        raise incomplete(source.name, list(map(str, problems)))
    if source.gguf_file and details["unexpected_keys"]:
        raise unused(source.name, sorted(details["unexpected_keys"]))
    _forget_quantizer(model)
    if source.gguf_file and isinstance(wanted, torch.dtype):
        model.config.dtype = wanted
        for parameter in model.parameters():  # not the buffers
            parameter.data = parameter.to(wanted)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UnsupportedModelError(
                f"{source.name}: the tensor {name} has values that are not finite",
                hint="the checkpoint is broken, or overflows in this --dtype",
            )
    log.info("loaded in %.1f s", time.monotonic() - start)
    model.get_input_embeddings().register_forward_pre_hook(_check_tokens)
    with loading(f"{source.name} on {target}"):
        return model.to(target).eval().requires_grad_(False)


def _loader(
    source: Source, config: PreTrainedConfig, stored: Mapping[str, StoredTensor]
) -> Callable[..., Any]:
    """The ``from_pretrained`` for these weights; those of Baichuan are translated in memory."""
    if read_baichuan(source):
        state = {name: tensor.read() for name, tensor in stored.items()}
        return partial(LlamaForCausalLM.from_pretrained, None, state_dict=state)
    return partial(auto_class_of(config).from_pretrained, source.location, **source.kwargs)


def load_generation_config(source: Source, config: PreTrainedConfig) -> GenerationConfig:
    """Read the generation config of a checkpoint; if it has none, derive it from the config.

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    file = find_file(source, GENERATION_CONFIG_NAME)
    if file:
        check_generation_config(source.name, read_object(file), config.get_text_config().vocab_size)
    with loading(f"the generation config of {source.name}"):
        if file:
            return GenerationConfig.from_pretrained(source.location)
        return GenerationConfig.from_model_config(config)


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model with parameters on the meta device; its buffers have values."""
    config = copy.deepcopy(config)  # from_config changes its dtype
    with loading(f"a model of type {config.model_type} with this config"), init_empty_weights():
        model = auto_class_of(config).from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    model.get_input_embeddings().register_forward_pre_hook(_check_tokens)
    return model.eval().requires_grad_(False)


def _check_tokens(module: Any, inputs: tuple[Any, ...]) -> None:
    """Check that each token has an embedding; otherwise a GPU would crash."""
    tokens, number = inputs[0], module.num_embeddings
    if tokens.numel() and not 0 <= (largest := int(tokens.max())) < number:
        raise DataError(
            f"the text has the token {largest}, but the model has embeddings for {number} tokens, "
            f"0 to {number - 1}",
            hint="take the tokenizer that belongs to this model, or a text without such tokens",
        )


def gguf_content(source: Source) -> GGUFContent | None:
    """Read the content of the GGUF file; None for other checkpoints."""
    return read_gguf(Path(source.location, source.gguf_file)) if source.gguf_file else None


def _forget_quantizer(model: Any) -> None:
    """Remove the traces of GGUF dequantisation, with which the model could not be saved."""
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer, model.config.quantization_config
        model.is_quantized = False


def usable_seqlen(seqlen: int, config: PreTrainedConfig) -> int:
    """Limit the sample length to the model's context; warn if that shortens it."""
    longest = config.get_text_config().max_position_embeddings
    if seqlen > longest:
        log.warning("seqlen %d is beyond the model's context: %d is used", seqlen, longest)
    return min(seqlen, longest)
