"""Turn the option that asks for a size into a limit on what the units of a model may cost."""

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig

from slimgpt.allocation.shapes import BlockShape, has_experts, whole_widths
from slimgpt.allocation.targets import Price, PriceCurve, Target
from slimgpt.checkpoint.writer import pruned_config, shard_bytes
from slimgpt.config import PruneConfig, target_of
from slimgpt.errors import ConfigError, MissingDependencyError
from slimgpt.methods.registry import make_method
from slimgpt.models.blocks import bind
from slimgpt.models.device import find_device
from slimgpt.models.loading import build_skeleton
from slimgpt.models.source import Source
from slimgpt.models.weights import result_dtype, saved_tensors
from slimgpt.pruning.latency import cached_table, check_measurable, setting_of
from slimgpt.pruning.latency_table import LatencyTable
from slimgpt.runtime.distributed import broadcast, is_main

# The names in a file that keeps those of the base may be longer than the model's own.
LONGER_NAME = 16


def find_target(
    source: Source, base_config: PreTrainedConfig, config: PruneConfig
) -> Target | None:
    """The limit that the options set, or None if they give ratios.

    Raises
    ------
    SlimGPTError
        If the size in the format that is asked for cannot be predicted.
    """
    extended = make_method(config).extend_config(base_config)
    if config.target_size is not None and (config.uniform or config.target_type != "auto"):
        _check_no_experts(extended)
    match target_of(config.model_dump()):
        case "target_params":
            return _params_target(extended, config)
        case "target_size" if config.target_type == "auto":
            return _file_target(source, extended, config)
        case "target_size":
            return _gguf_target(source, extended, config)
        case "target_kv_cache":
            return _cache_target(extended, config)
        case "target_latency":
            return _latency_target(source, extended, config)
    return None


def _check_no_experts(config: PreTrainedConfig) -> None:
    """Check that there are no experts: files have them singly, or rows for whole blocks."""
    if has_experts([block.shape for block in bind(build_skeleton(config))]):
        raise ConfigError(
            "the size of this file cannot be predicted for a model with experts",
            hint="ask for --target-params, or for --target-size without --target-type and "
            "without --uniform",
        )


def _params_target(extended: PreTrainedConfig, config: PruneConfig) -> Target:
    assert config.target_params is not None
    skeleton = build_skeleton(extended)
    shapes = [block.shape for block in bind(skeleton)]
    return Target(
        "target_params",
        config.target_params,
        config.target_params,
        skeleton.num_parameters() - _units(shapes),
        _prices(shapes, 1),
    )


def _file_target(source: Source, extended: PreTrainedConfig, config: PruneConfig) -> Target:
    """Limit on the safetensors files; headers of smaller models have no more digits."""
    assert config.target_size is not None
    skeleton = build_skeleton(extended, result_dtype(source, extended, config.dtype))
    shapes, tensors = [block.shape for block in bind(skeleton)], saved_tensors(skeleton)
    files = shard_bytes(tensors, config.max_shard_size)
    digits = len(str(config.max_shard_size)) if len(files) > 1 else 0  # begin and end move
    slack = len(tensors) * (2 * digits + (LONGER_NAME if config.uniform else 0))
    size = skeleton.dtype.itemsize
    return Target(
        "target_size",
        int(config.target_size),
        int(config.target_size),
        sum(files) + slack - size * _units(shapes),
        _prices(shapes, size),
        unit="bytes",
    )


def _gguf_target(source: Source, extended: PreTrainedConfig, config: PruneConfig) -> Target:
    """Limit on the GGUF file; llama.cpp's graph depends on whether the layers differ."""
    if find_spec("gguf") is None:
        command = "pip install 'slimgpt[gguf]'"
        raise MissingDependencyError("gguf", f"--target-type {config.target_type}", command)
    from slimgpt.exporting.gguf_size import gguf_size

    assert config.target_size is not None
    shapes = [block.shape for block in bind(build_skeleton(extended))]
    alike = list(map(whole_widths, shapes))
    # A layer of one channel makes the layers differ, also where rows are padded.
    probes = [alike] if config.uniform else [[(*alike[0][:-1], 1), *alike[1:]], alike]
    limit = int(config.target_size)
    target, fixed = Target("target_size", limit, limit, 0, (), unit="bytes"), 0
    for widths in probes:
        small = pruned_config(extended, widths, config.uniform)
        size = gguf_size(source, small, config.target_type)
        prices = tuple(
            tuple(
                Price(layer.attention, layer.attention_step * sub.unit_params)
                if sub.kind == "attention"
                else Price(layer.ffn, layer.ffn_step * sub.unit_params)
                for sub in shape.sublayers
            )
            for shape, layer in zip(shapes, size.layers, strict=True)
        )
        target = replace(target, prices=prices)
        fixed = max(fixed, size.num_bytes - target.cost(shapes, widths))
    return replace(target, fixed=fixed)


def _cache_target(extended: PreTrainedConfig, config: PruneConfig) -> Target:
    """Limit on the KV cache, counted in columns of the keys.

    Layers whose attention stays whole do not count; where there are others too, it is linear.
    """
    assert config.target_kv_cache is not None
    fixed, prices, shapes = 0, [], []
    for block in bind(build_skeleton(extended)):
        shapes.append(block.shape)
        prices.append([Price(0)] * len(block.sublayers))
        for index, sub in enumerate(block.sublayers):
            stays = not sub.spec.widths or (config.uniform and sub.spec.rebuilt)
            if sub.kind != "attention" or stays:
                continue
            head_dim = sub.output.in_features // sub.counts.get("head", sub.num_units)
            if sub.counts.get("group") == 1:  # all query heads share one
                fixed += head_dim
            else:
                prices[-1][index] = Price(head_dim, sub.shape.unit_params)
    target = Target(
        "target_kv_cache",
        config.target_kv_cache,
        0,
        fixed,
        tuple(map(tuple, prices)),
        unit="of the dense KV cache",
        only_attention=True,
    )
    whole = target.cost(shapes, list(map(whole_widths, shapes)))
    if not whole:
        raise ConfigError(
            f"target_kv_cache={config.target_kv_cache:g} cannot be reached: the attention of "
            f"{extended.model_type} models stays whole" + " with --uniform" * config.uniform,
            hint="ask for --target-params or --target-size; only FFNs become smaller then",
        )
    limit = math.floor(config.target_kv_cache * whole + 1e-9)
    return replace(target, whole=whole, limit=limit)


def _latency_target(source: Source, extended: PreTrainedConfig, config: PruneConfig) -> Target:
    """Limit on the predicted latency, in nanoseconds."""
    assert config.target_latency is not None
    check_measurable(source.name, extended)
    shapes = [block.shape for block in bind(build_skeleton(extended))]
    found = broadcast(is_main() and _latency_table(source, extended, config).model_dump())
    table = LatencyTable.model_validate(found)
    curves = [
        [
            PriceCurve.fitted(sub, [(w, round(seconds * 1e9)) for w, seconds in measured.seconds])
            for sub, measured in zip(shape.sublayers, table.kinds[kind], strict=True)
        ]
        for shape, kind in zip(shapes, table.blocks, strict=True)
    ]
    target = Target(
        "target_latency",
        config.target_latency,
        0,
        round(table.rest_seconds * 1e9),
        tuple(map(tuple, curves)),
        unit=f"of the dense {table.setting.described}",
    )
    whole = target.cost(shapes, list(map(whole_widths, shapes)))
    return replace(target, whole=whole, limit=math.floor(config.target_latency * whole + 1e-9))


def _latency_table(source: Source, extended: PreTrainedConfig, config: PruneConfig) -> LatencyTable:
    """The table that the options name, or that of this machine."""
    if config.latency_table is None:
        device, dtype = find_device(config.device), result_dtype(source, extended, config.dtype)
        setting = setting_of(extended, config.latency_phase, dtype, device)
        file = cached_table(extended, setting, device)
    else:
        file = Path(config.latency_table)
    table = LatencyTable.read(file)
    table.check(file, [block.shape for block in bind(build_skeleton(extended))])
    if table.setting.phase != config.latency_phase:
        raise ConfigError(
            f"{file} holds {table.setting.phase} latencies, not those of {config.latency_phase}",
            hint=f"use --latency-phase {table.setting.phase}, or another table",
        )
    return table


def _units(shapes: Sequence[BlockShape]) -> int:
    """Parameters of all units, of fixed sublayers too."""
    return sum(sub.params for shape in shapes for sub in shape.sublayers)


def _prices(shapes: Sequence[BlockShape], price: int) -> tuple[tuple[Price, ...], ...]:
    """The same price for each parameter."""
    return tuple(tuple(Price(price) for _ in shape.sublayers) for shape in shapes)
