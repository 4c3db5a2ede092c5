"""Read and check GGUF files, including what transformers' loader drops.

The loader trusts the counts in a file. It ignores scaled rotary frequencies, biases that are
optional in the model type, and every tensor whose name it does not know.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimgpt.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

ROPE_FACTORS = "rope_freqs.weight"

# Scalings of the rotary frequencies that do not depend on the length of the text.
STATIC_ROPE = ("linear", "llama3")

# What gguf raises for a file that is truncated, damaged or not a GGUF file.
_READ_ERRORS = (OSError, ValueError, LookupError, ArithmeticError, TypeError)
BROKEN_GGUF = "the file is damaged or is no GGUF file: download or write it again"

_LINEARS = "attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down"

_WEIGHTS = rf"(?:token_embd|output_norm|output|blk\.\d+\.(?:attn_norm|ffn_norm|{_LINEARS}))\.weight"

# Tensor names per graph that transformers can build.
_TENSORS = {
    "llama": rf"{_WEIGHTS}|rope_freqs\.weight|blk\.\d+\.(?:{_LINEARS})\.bias",
    "qwen2": rf"{_WEIGHTS}|blk\.\d+\.attn_[qkv]\.bias",
    "qwen3": rf"{_WEIGHTS}|blk\.\d+\.attn_[qk]_norm\.weight",
    "gemma3": rf"{_WEIGHTS}|blk\.\d+\.(?:attn_[qk]|post_attention|post_ffw)_norm\.weight",
}


@dataclass(frozen=True)
class GGUFContent:
    """Metadata and tensors of a GGUF file.

    Attributes
    ----------
    file : Path
        The file.
    values : dict
        Metadata; for an array of the tokenizer its length.
    shapes : dict
        Shape of each tensor, fastest dimension first (GGUF's order).
    rope_factors : tuple of float
        Divisors of the rotary frequencies; empty if the file has none.
    """

    file: Path
    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: tuple[float, ...]

    @property
    def arch(self) -> str:
        """llama.cpp's name of the graph."""
        return str(self.values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value of this graph, e.g. ``block_count``."""
        return self.values.get(f"{self.arch}.{key}", default)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the tokenizer."""
        return self.values.get("tokenizer.ggml.tokens", 0)


def open_gguf(file: Path) -> "GGUFReader":
    """Open a GGUF file.

    Raises
    ------
    ConfigError
        If it is damaged or not a GGUF file.
    """
    from gguf import GGUFValueType
    from gguf.gguf_reader import GGUFReader  # not the one that `quick_loading` puts in its place

    class BoundedReader(GGUFReader):
        """Reader that rejects arrays longer than the file, and reads vocabularies faster."""

        def _get_str(self, offset: int) -> Any:
            self._last = super()._get_str(offset)
            return self._last

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = self._get(orig_offs, "u4"), self._get(orig_offs + 4, "u8")
            item, start = GGUFValueType(kind[0]), orig_offs + 12
            scalar = self.gguf_scalar_to_np.get(item)
            size = scalar().itemsize if scalar else 8  # of the length of a string
            left = len(self.data) - start
            if int(count[0]) * size > left:
                key = bytes(self._last[1])[:100].decode(errors="replace")
                raise ValueError(
                    f"{key} has {count[0]} values of {size} bytes or more, but {left} bytes follow"
                )
            if not count[0] or not (scalar or item == GGUFValueType.STRING):
                return super()._get_field_parts(orig_offs, raw_type)
            if scalar:
                values = self._get(start, scalar, count[0]).view(np.ndarray)
                parts, end = list(values.reshape(-1, 1)), start + values.nbytes
            else:
                parts, end = self._strings(start, int(count[0]))
            places = list(range(2, 2 + len(parts)))
            return end - orig_offs, [kind, count, *parts], places, [GGUFValueType(raw_type), item]

        def _strings(self, start: int, count: int) -> tuple[list[np.ndarray], int]:
            """Read an array of strings, and find its end; gguf takes seconds for a vocabulary."""
            data, strings = self.data.view(np.ndarray), []
            order: Any = self.endianess.name.lower()
            for _ in range(count):
                end = start + 8 + int.from_bytes(data[start : start + 8].tobytes(), order)
                if end > len(data):
                    raise IndexError("it ends in an array of strings")
                strings.append(data[start + 8 : end])
                start = end
            return strings, start

    try:
        return BoundedReader(file)
    except _READ_ERRORS as err:
        raise _broken(file, err) from None


@contextmanager
def quick_loading() -> Iterator[None]:
    """Make transformers' loader of GGUF files several times as fast.

    It uses `open_gguf`, and makes the table of tensor names once, not again for every module.
    """
    import gguf

    module: Any = gguf
    reader, find_names = module.GGUFReader, module.get_tensor_name_map
    module.GGUFReader, module.get_tensor_name_map = open_gguf, cache(find_names)
    try:
        yield
    finally:
        module.GGUFReader, module.get_tensor_name_map = reader, find_names


def read_gguf(file: Path) -> GGUFContent:
    """Read the metadata and tensor names of a GGUF file, and check that they agree.

    Raises
    ------
    ConfigError
        If the file is damaged or not a GGUF file.
    UnsupportedModelError
        If its metadata contradicts its tensors, or it has unknown tensors.
    """
    stat = file.stat()
    return _read(file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=16)
def _read(file: Path, *_: int) -> GGUFContent:
    """Read a file; the other arguments are the cache key of its current state."""
    from gguf import GGUFValueType

    reader = open_gguf(file)
    try:
        values = {
            name: len(field.data)
            if name.startswith("tokenizer.") and field.types[0] == GGUFValueType.ARRAY
            else field.contents()
            for name, field in reader.fields.items()
        }
        shapes = {t.name: tuple(int(size) for size in t.shape) for t in reader.tensors}
        factors = [t.data.ravel().tolist() for t in reader.tensors if t.name == ROPE_FACTORS]
    except _READ_ERRORS as err:
        raise _broken(file, err) from None
    content = GGUFContent(file, values, shapes, tuple(factors[0]) if factors else ())
    if content.arch in _TENSORS:
        _check_names(content)
        _check_numbers(content)
    if content.arch == "llama":
        _check_biases(content)
    return content


def _broken(file: Path, err: Exception) -> ConfigError:
    # gguf indexes beyond the end of a truncated file.
    reason = "it is truncated" if isinstance(err, IndexError) else " ".join(str(err).split())[:200]
    return ConfigError(f"cannot load {file}: {reason}", hint=BROKEN_GGUF)


def _check_names(content: GGUFContent) -> None:
    unknown = [n for n in content.shapes if not re.fullmatch(_TENSORS[content.arch], n)]
    if unknown:
        raise UnsupportedModelError(
            f"{content.file.name} has {len(unknown)} tensors that models of type "
            f"{content.arch!r} do not have, first {unknown[0]}",
            hint="they would be ignored, which changes the model: use the checkpoint that the "
            "file was made from",
        )


def _check_biases(content: GGUFContent) -> None:
    """Reject biases in only some projections of a sublayer, for LLaMA's graph."""
    found = {name.split(".")[2] for name in content.shapes if name.endswith(".bias")}
    for prefix in ("attn", "ffn"):
        wanted = {name for name in _LINEARS.split("|") if name.startswith(prefix)}
        if 0 < len(found & wanted) < len(wanted):
            raise UnsupportedModelError(
                f"{content.file.name} has biases of {', '.join(sorted(found & wanted))} alone; "
                f"models of type {content.arch!r} have them in all {prefix} projections or none",
                hint="use the checkpoint that the file was made from",
            )


def _check_numbers(content: GGUFContent) -> None:
    """Compare the metadata with the tensors, whose sizes are bounded by the file size."""
    shapes = content.shapes
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    width, rows = _shape(content, "token_embd.weight")
    queries, keys, channels = (
        _shape(content, f"blk.0.{name}.weight")[1] for name in ("attn_q", "attn_k", "ffn_up")
    )
    heads, kv_heads = content.get("attention.head_count"), content.get("attention.head_count_kv")
    _check_number(content, "block_count", len(blocks), "blocks")
    _check_number(content, "embedding_length", width, "columns of token_embd.weight")
    _check_number(content, "feed_forward_length", channels, "rows of blk.0.ffn_up.weight")
    if content.get("vocab_size", content.num_tokens) != rows or content.num_tokens > rows:
        stated = content.get("vocab_size", "not given")
        found = f"{content.num_tokens} tokens and {rows} rows of token_embd.weight"
        raise _mismatch(content, "vocab_size", stated, found)
    for name, count, size in (("head_count", heads, queries), ("head_count_kv", kv_heads, keys)):
        if not isinstance(count, int) or count < 1 or size % count:
            raise _mismatch(content, f"attention.{name}", count, f"{size} rows of its projection")


def _shape(content: GGUFContent, name: str) -> tuple[int, int]:
    shape = content.shapes.get(name, ())
    if len(shape) != 2:
        raise UnsupportedModelError(
            f"{content.file.name} has no matrix {name}",
            hint="the file is incomplete, or has only a vocabulary: download or write it again",
        )
    return shape


def _check_number(content: GGUFContent, key: str, found: int, what: str) -> None:
    if content.get(key) != found:
        raise _mismatch(content, key, content.get(key), f"{found} {what}")


def _mismatch(content: GGUFContent, key: str, stated: Any, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{content.file.name}: its metadata says {key} {str(stated)[:60]}, but it has {found}",
        hint=BROKEN_GGUF,
    )


def complete_config(config: PreTrainedConfig, content: GGUFContent) -> None:
    """Add to a config the settings that transformers does not read from a GGUF file.

    Parameters
    ----------
    config : PreTrainedConfig
        As read by transformers; changed in place.
    content : GGUFContent
        Content of the same file.

    Raises
    ------
    UnsupportedModelError
        If the rotary frequencies are scaled in a way that transformers cannot reproduce.
    """
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    for key, name in biases.items():
        if hasattr(config, key):
            setattr(config, key, name in content.shapes)
    if hasattr(config, "head_dim") and content.get("attention.key_length"):
        config.head_dim = content.get("attention.key_length")
    rope = _rope_parameters(config, content)
    if content.arch == "gemma3":
        _complete_gemma3(config, content)
        # llama.cpp scales the frequencies only where a layer attends to all tokens.
        local = {"rope_type": "default", "rope_theta": content.get("rope.freq_base_swa", 10000.0)}
        rope = {"full_attention": rope, "sliding_attention": local}
    config.rope_parameters = rope


def _complete_gemma3(config: Any, content: GGUFContent) -> None:
    """Set what llama.cpp assumes, or derives from the number of blocks."""
    has_window = bool(content.get("attention.sliding_window"))
    period = content.get("attention.sliding_window_pattern", 6) if has_window else 1
    if type(period) is not int or period < 1:
        raise UnsupportedModelError(
            f"{content.file.name} has attention.sliding_window_pattern {str(period)[:60]}, "
            "not a number of blocks, the last of which attends to all tokens",
            hint="use the checkpoint that the file was made from",
        )
    config.layer_types = [
        "sliding_attention" if block % period else "full_attention"
        for block in range(1, config.num_hidden_layers + 1)
    ]
    is_27b = config.num_hidden_layers == 62
    config.query_pre_attn_scalar = (
        config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    )
    config.final_logit_softcapping = content.get("final_logit_softcapping")


def rope_factors(config: PreTrainedConfig) -> Tensor:
    """Compute the divisors that turn the plain rotary frequencies into those of a config.

    llama.cpp takes them from the tensor `ROPE_FACTORS`.

    Parameters
    ----------
    config : PreTrainedConfig
        Config of a model with one of the scalings `STATIC_ROPE`.

    Returns
    -------
    Tensor
        One factor for each pair of dimensions of a head, float32.
    """
    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, device="cpu")
    exponents = torch.arange(len(scaled)) / len(scaled)
    return config.rope_parameters["rope_theta"] ** -exponents / scaled


def _rope_parameters(config: PreTrainedConfig, content: GGUFContent) -> dict[str, Any]:
    """Derive transformers' ``rope_parameters`` from a file."""
    plain = {"rope_type": "default", "rope_theta": content.get("rope.freq_base", 10000.0)}
    kind = content.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise _unknown_rope(content, f"of the type {kind!r}")
    scale = content.get("rope.scaling.factor", content.get("rope.scale_linear", 0.0))
    scale = scale if scale and kind == "linear" else 1.0
    factors = torch.tensor(content.rope_factors or (1.0,)) * scale
    if not (factors.isfinite() & (factors > 0)).all():
        raise _unknown_rope(content, "by factors that are not positive")
    largest = float(f"{factors.max().item():.6g}")
    if _is_close(factors, torch.full_like(factors, largest)):
        return plain if largest == 1 else plain | {"rope_type": "linear", "factor": largest}
    for exponent in range(4, 21):
        # LLaMA 3; its files do not state the original context length, so try each power of two.
        candidate = plain | {
            "rope_type": "llama3",
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2**exponent,
        }
        config.rope_parameters = candidate
        if _is_close(factors, rope_factors(config)):
            return candidate
    raise _unknown_rope(
        content, f"by {len(factors)} factors of {factors.min():.4g} to {factors.max():.4g}"
    )


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=0)


def _unknown_rope(content: GGUFContent, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{content.file.name} scales its rotary frequencies {how}, which cannot be read from GGUF",
        hint=f"scalings that can: {', '.join(STATIC_ROPE)} (low_freq_factor 1, high_freq_factor "
        "4); use the checkpoint that the file was made from",
    )
