"""Measure the latency of a model's parts, with random weights, and keep it in a table.

Each kind of sublayer runs by itself at some widths, as a part of models that are built with these
widths. The sublayers of one kind of block and the rest of the model take turns in random order, so
that drift of the machine concerns all of them, and so that no weights stay in the processor's
cache. What the block adds around its sublayers is the difference from the whole block's time.
"""

import copy
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig

from slimgpt.allocation.shapes import BlockWidths, SublayerShape, has_experts
from slimgpt.calibration.activations import Recorder
from slimgpt.checkpoint.writer import pruned_config
from slimgpt.config import LatencyConfig, Phase
from slimgpt.errors import ConfigError, UnsupportedModelError
from slimgpt.models.blocks import Block, bind, blocks_of, decoder_of, settings_of
from slimgpt.models.device import find_device
from slimgpt.models.layout import check_language_head, family_in
from slimgpt.models.loading import build_skeleton, load_config
from slimgpt.models.source import find_model
from slimgpt.models.streaming import BlockStandIn
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.weights import result_dtype, text_tensors
from slimgpt.pruning.latency_table import (
    LatencySetting,
    LatencyTable,
    SublayerLatency,
    cache_directory,
)
from slimgpt.runtime.environment import machine, versions
from slimgpt.runtime.files import write_atomically, writing

log = logging.getLogger(__name__)

CONTEXT = 512
NUM_WIDTHS = 8  # of a sublayer, evenly spaced, beside the smallest
CHANNELS = 8  # measured widths are multiples of this
WARMUP, ROUNDS = 1, 11
NEW_TOKENS = 9  # of the text model without its blocks
CALLS_ON_GPU = 10  # timed together, so that waiting for the device counts little

# Prepares a measurement, which then runs once and returns the seconds.
Timer = Callable[[], Callable[[], float]]


def latency(model: str, output: str | Path, **options: Any) -> LatencyTable:
    """Measure the latency of a model's parts on this machine, and write it to a file.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``. Its weights are
        not read.
    output : str or Path
        The file, for the option ``latency_table`` of `slimgpt.prune`.
    **options
        The fields of `slimgpt.config.LatencyConfig`.

    Returns
    -------
    LatencyTable
        The content of the file.

    Raises
    ------
    SlimGPTError
        If an option or the model is wrong, or the file cannot be written.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.latency("smollm2-135m", "laptop.json", phase="decode")  # doctest: +SKIP
    """
    config = LatencyConfig.create(**options)
    source, device = find_model(model), find_device(config.device)
    base_config = load_config(source)
    check_measurable(source.name, base_config)
    dtype = result_dtype(source, base_config, config.dtype)
    setting = setting_of(base_config, config.phase, dtype, device, config.context)
    table = measure(base_config, setting, device)
    with writing(Path(output)):
        write_atomically(Path(output), f"{table.model_dump_json(indent=1)}\n")
    return table


def check_measurable(name: str, config: PreTrainedConfig) -> None:
    """Check that the latency of a model can be predicted.

    Raises
    ------
    UnsupportedModelError
        If it predicts no tokens, or has experts.
    """
    check_language_head(name, config)
    if has_experts([block.shape for block in bind(build_skeleton(config))]):
        raise UnsupportedModelError(
            f"the latency of {name} cannot be predicted: each token uses other experts",
            hint="ask for --target-params or --target-size, and measure with `slimgpt bench`",
        )


def setting_of(
    config: PreTrainedConfig,
    phase: Phase,
    dtype: torch.dtype,
    device: torch.device,
    context: int | None = None,
) -> LatencySetting:
    """Collect what a latency on this machine depends on, beside the model.

    Raises
    ------
    ConfigError
        If the context is too long for the model.
    """
    longest = config.get_text_config().max_position_embeddings
    context = context or default_context(config)
    if context + NEW_TOKENS > longest:
        raise ConfigError(
            f"context={context} and {NEW_TOKENS} new tokens are beyond the model's context of "
            f"{longest}",
            hint=f"use a --context of {longest - NEW_TOKENS} at most",
        )
    found = versions()
    return LatencySetting(
        phase=phase,
        context=context,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else machine(),
        threads=torch.get_num_threads(),
        versions={name: found[name] for name in ("torch", "transformers")},
    )


def default_context(config: PreTrainedConfig) -> int:
    """Tokens of the context if no option says how many: 512, or half of what the model takes."""
    return max(min(CONTEXT, config.get_text_config().max_position_embeddings // 2), 1)


def cached_table(config: PreTrainedConfig, setting: LatencySetting, device: torch.device) -> Path:
    """Find the file with the table of a model, in the user's cache; measure it if there is none.

    Raises
    ------
    RunStateError
        If it cannot be written.
    """
    key = setting.model_dump_json() + config.to_json_string()
    file = cache_directory() / f"{sha256(key.encode()).hexdigest()[:32]}.json"
    if not file.exists():
        table = measure(config, setting, device)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, f"{table.model_dump_json(indent=1)}\n")
    log.info("the latency table of this machine is %s", file)
    return file


@torch.no_grad()
def measure(
    config: PreTrainedConfig, setting: LatencySetting, device: torch.device
) -> LatencyTable:
    """Measure each kind of sublayer at some widths, and everything but the blocks.

    Parameters
    ----------
    config : PreTrainedConfig
        Config of the dense model.
    setting : LatencySetting
        From `setting_of`, on this machine.
    device : torch.device
        Where the model runs.
    """
    log.info("measuring the %s on %s", setting.described, setting.machine)
    dtype = getattr(torch, setting.dtype)
    dense = list(bind(build_skeleton(config)))
    keys = [(settings_of(block.module), block.shape) for block in dense]
    kinds = list(dict.fromkeys(keys))
    smaller = [
        list(bind(build_skeleton(pruned_config(config, widths, uniform=False), dtype)))
        for widths in _grid(dense)
    ]
    rest = _Rest(config, setting, device)
    rest_seconds, measured = [], []
    for key in kinds:
        blocks = [found[keys.index(key)] for found in smaller]
        for block in blocks:
            _fill(block.module, device)
        timings = _interleaved([lambda: rest.seconds, *_timers(blocks, rest)])
        for block in blocks:
            block.module.to("meta")
        rest_seconds += timings[0]
        measured.append(_latencies(dense[keys.index(key)].sublayers, timings[1:]))
    return LatencyTable(
        setting=setting,
        rest_seconds=statistics.median(rest_seconds),
        kinds=tuple(measured),
        blocks=tuple(map(kinds.index, keys)),
    )


def measured_widths(sublayer: SublayerShape) -> list[int]:
    """Widths at which a sublayer is measured, smallest first: one unit to all, evenly spaced."""
    number = sublayer.num_units
    if sublayer.is_fixed:
        return [number]
    step = CHANNELS if sublayer.kind == "ffn" else 1
    evenly = (number * i // (NUM_WIDTHS * step) * step for i in range(1, NUM_WIDTHS))
    return sorted({1, *filter(None, evenly), number})


def _grid(blocks: Sequence[Block]) -> list[list[BlockWidths]]:
    """Widths of some models in which each sublayer has each of its widths, the last the whole."""
    widths = [[measured_widths(s.shape) for s in block.sublayers] for block in blocks]
    longest = max(len(found) for block in widths for found in block)
    return [
        [tuple(found[max(len(found) - longest + i, 0)] for found in block) for block in widths]
        for i in range(longest)
    ]


class _Rest:
    """A model whose blocks do nothing, with random weights.

    Parameters
    ----------
    config, setting, device
        As in `measure`.
    """

    def __init__(
        self, config: PreTrainedConfig, setting: LatencySetting, device: torch.device
    ) -> None:
        self.setting, self.device, self.family = setting, device, family_in(config)
        self.model: Any = build_skeleton(config, getattr(torch, setting.dtype))
        self.num_blocks = len(blocks_of(self.model))
        self._place([_PassThrough(self.family.returns_tuple) for _ in range(self.num_blocks)])
        _fill(self.model, device, text_tensors(self.model))
        self.model.tie_weights()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        vocab_size = config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        tokens_NT = torch.randint(vocab_size, (1, setting.context), generator=generator)
        self.tokens_NT = tokens_NT.to(device)

    def _place(self, blocks: Sequence[nn.Module]) -> None:
        decoder_of(self.model).set_submodule(self.family.blocks, nn.ModuleList(blocks))

    def seconds(self) -> float:
        """Time of a token in generation."""
        is_decode = self.setting.phase == "decode"
        number, clock = NEW_TOKENS if is_decode else 1, _Clock(self.device)
        mask = torch.ones_like(self.tokens_NT)
        self.model.generate(
            self.tokens_NT, attention_mask=mask, max_new_tokens=number, streamer=clock
        )
        start, first, last = clock.times[0], clock.times[1], clock.times[-1]
        return (last - first) / (number - 1) if is_decode else first - start

    def arguments(self, block: Block, num_tokens: int, cache: Cache) -> dict[str, Any]:
        """Arguments with which the model calls a block, beside the hidden states."""
        before = list(blocks_of(self.model))
        recorders: list[nn.Module] = list(before)
        recorders[block.index] = recorder = Recorder(block.module, self.family.returns_tuple)
        length = cache.get_seq_length() + num_tokens
        mask = torch.ones(1, length, dtype=torch.int64, device=self.device)
        self._place(recorders)
        try:
            decoder_of(self.model)(
                self.tokens_NT[:, :num_tokens],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            self._place(before)
        return recorder.kwargs


class _PassThrough(BlockStandIn):
    """A block that does nothing."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        """Return the hidden states that come in."""
        self.hidden = hidden
        return super().forward()


class _Clock:
    """A streamer that records the times of the prompt and of each token."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device

    def put(self, _: Any) -> None:
        """Record the time."""
        self.times.append(_now(self._device))

    def end(self) -> None:
        """Do nothing."""


class _BlockCache(DynamicCache):
    """A cache of one block; the others count as equally full."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config=config)
        self._index = index

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(self._index)

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> tuple[int, int]:
        return super().get_mask_sizes(query, self._index)


def _fill(module: nn.Module, device: torch.device, names: Iterable[str] | None = None) -> None:
    """Give the parameters of a module random values, on a device, and move its buffers there."""
    wanted = None if names is None else set(names)
    values = {
        name: torch.empty_like(parameter, device=device).normal_(std=0.02)
        for name, parameter in module.named_parameters()
        if wanted is None or name in wanted
    }
    module.load_state_dict(values, strict=False, assign=True)
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, buffer.to(device))


def _timers(blocks: Sequence[Block], rest: _Rest) -> list[Timer]:
    """Timers of the sublayers of blocks of growing widths, each width once, and of the last block.

    They come in the order of the sublayers, then of the widths.
    """
    setting, device, dense = rest.setting, rest.device, blocks[-1]
    is_decode = setting.phase == "decode"
    size = dense.sublayers[0].output.out_features
    hidden_NTC = torch.randn(1, setting.context, size, dtype=rest.model.dtype, device=device)
    config, timers = rest.model.config, []

    def arguments(block: Block, sublayer: Sublayer) -> dict[str, Any]:
        """Arguments of a block with a cache of its own: empty, or with the context."""
        cache = _BlockCache(config, block.index)
        found = rest.arguments(block, setting.context, cache)
        if not is_decode:
            return found
        sublayer.forward(sublayer.normed(hidden_NTC), found)
        return rest.arguments(block, 1, cache)

    given_NTC = hidden_NTC[:, -1:] if is_decode else hidden_NTC
    for index, sublayer in enumerate(dense.sublayers):
        for block in blocks[-len(measured_widths(sublayer.shape)) :]:
            smaller = block.sublayers[index]
            kwargs = arguments(block, smaller) if sublayer.kind == "attention" else {}
            call = partial(_run_sublayer, smaller, given_NTC)
            timers.append(partial(_timer, call, kwargs, device))
    attention = next(s for s in dense.sublayers if s.kind == "attention")
    call = partial(_run_block, dense, given_NTC)
    return [*timers, partial(_timer, call, arguments(dense, attention), device)]


def _run_sublayer(sublayer: Sublayer, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    output = sublayer.forward(sublayer.normed(hidden), kwargs)
    return hidden + sublayer.contribution(output)


def _run_block(block: Block, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
    return block.module(hidden, **kwargs)


def _timer(
    call: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any], device: torch.device
) -> Callable[[], float]:
    """Prepare a call, with a copy of the cache; on a GPU the mean of several calls is measured."""
    copies = [
        {k: copy.deepcopy(v) if isinstance(v, Cache) else v for k, v in kwargs.items()}
        for _ in range(1 if device.type == "cpu" else CALLS_ON_GPU)
    ]

    def seconds() -> float:
        start = _now(device)
        for own in copies:
            call(own)
        mean = (_now(device) - start) / len(copies)
        copies.clear()  # the next call gets the memory, as in a model
        return mean

    return seconds


def _now(device: torch.device) -> float:
    """Seconds, when the device has done its work.

    Those of a CPU do not count while the thread waits for a core that does something else. (The
    clock of Windows is too coarse for this.)
    """
    if device.type == "cpu" and sys.platform != "win32":
        return time.thread_time()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _interleaved(timers: Sequence[Timer]) -> list[list[float]]:
    """Seconds of each timer, by round. They take turns, in an order that changes.

    All of a round are prepared first, so that one runs right after the other, as in a model.
    """
    seconds: list[list[float]] = [[] for _ in timers]
    order, shuffle = list(range(len(timers))), random.Random(0).shuffle
    for _ in range(WARMUP + ROUNDS):
        shuffle(order)
        prepared = [timer() for timer in timers]
        for index in order:
            seconds[index].append(prepared[index]())
    return [found[WARMUP:] for found in seconds]


def _latencies(
    sublayers: Sequence[Sublayer], timings: Sequence[Sequence[float]]
) -> tuple[SublayerLatency, ...]:
    """Medians of the rounds of `_timers`; the sublayers share what the block adds."""
    grids = [measured_widths(sublayer.shape) for sublayer in sublayers]
    found = iter(timings)
    by_sublayer = [[next(found) for _ in grid] for grid in grids]
    whole = zip(*(rounds[-1] for rounds in by_sublayer), strict=True)
    added = [block - sum(parts) for block, parts in zip(next(found), whole, strict=True)]
    share = max(statistics.median(added), 0.0) / len(sublayers)
    return tuple(
        SublayerLatency(
            kind="attention" if sublayer.kind == "attention" else "ffn",
            num_units=sublayer.num_units,
            unit_params=sublayer.shape.unit_params,
            seconds=tuple(
                (width, statistics.median(rounds) + share)
                for width, rounds in zip(grid, rounds_by_width, strict=True)
            ),
        )
        for sublayer, grid, rounds_by_width in zip(sublayers, grids, by_sublayer, strict=True)
    )
