"""Open and check the inputs of a run, and draw its calibration samples."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from slimgpt.allocation.reallocation import samples_needed
from slimgpt.allocation.shapes import BlockShape, BlockWidths, has_experts, removed_params
from slimgpt.calibration.activations import choose_batch_size
from slimgpt.config import PruneConfig
from slimgpt.data.datasets import PYDOCS, SELF, check_dataset, dataset_files
from slimgpt.data.samples import READING_BYTES, SampleOptions, calibration_tokens
from slimgpt.data.self_generated import sample_from_model
from slimgpt.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from slimgpt.methods.base import Method
from slimgpt.methods.registry import METHODS, make_method
from slimgpt.models.blocks import bind
from slimgpt.models.device import fast_dtype
from slimgpt.models.experts import Experts
from slimgpt.models.layout import has_language_head
from slimgpt.models.loading import (
    build_skeleton,
    load_config,
    load_generation_config,
    load_model,
    usable_seqlen,
)
from slimgpt.models.source import Source
from slimgpt.models.stored import read_tensor
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.tokenizer import copied_files, load_tokenizer
from slimgpt.models.weights import open_weights, tensor_names
from slimgpt.pruning.depth import check_same_layers, choice_bytes, choose_layers
from slimgpt.pruning.family_check import check_family
from slimgpt.pruning.job import Inputs, Job
from slimgpt.pruning.memory import (
    FLOAT32,
    MemoryEstimate,
    free_gpu_memory,
    place_activations,
    probe_bytes,
    refit_bytes,
    solver_bytes,
)
from slimgpt.pruning.plan import (
    initial_widths,
    is_measured,
    last_layers,
    shapes_of,
    target_of_kept,
    without_dropped,
)
from slimgpt.runtime.distributed import is_main, shard
from slimgpt.runtime.environment import Stopwatch, computation, versions
from slimgpt.runtime.files import describe_file
from slimgpt.runtime.progress import Progress
from slimgpt.runtime.run_directory import GENERATED_FILE, SCORES_FILE, Run

log = logging.getLogger(__name__)

READ_AHEAD = 2  # blocks in host memory beside a GPU: one is read, the other is pinned


def check_inputs(config: PruneConfig) -> None:
    """Check that the calibration data exists and the packages for the method are installed."""
    for name in config.calibration:
        check_dataset(name, "calibration")
    package = METHODS[config.method].package
    if package and find_spec(package) is None:
        raise MissingDependencyError(
            package, f"the method {config.method!r}", "pip install 'slimgpt[recover]'"
        )


def _check_headless(source: Source, config: PruneConfig) -> None:
    """Check that no option needs predictions of tokens, which the model does not make."""
    needs = {
        "--calibration self": (SELF in config.calibration, "other texts with --calibration"),
        f"--widths {config.widths}": (config.widths != "scheduled", "--widths scheduled"),
        "--drop-layers": (config.drop_layers > 0, "--drop-layers 0"),
        f"--method {config.method}": (METHODS[config.method].needs_gradients, "another --method"),
    }
    found = {option: instead for option, (needed, instead) in needs.items() if needed}
    if found:
        raise UnsupportedModelError(
            f"{source.name} has no head for language modelling: it predicts no tokens, which "
            f"{' and '.join(found)} need{'s' if len(found) == 1 else ''}",
            hint=f"choose {' and '.join(found.values())}",
        )


def _check_method(
    method: Method, shapes: Sequence[BlockShape], widths: Sequence[BlockWidths]
) -> None:
    """Check that the method can remove the units that are to go."""
    wanted, units = set(), {"attention": "groups", "ffn": "channels", "experts": "experts"}
    for shape, block in zip(shapes, widths, strict=True):
        for sublayer, width in zip(shape.sublayers, block, strict=True):
            if sublayer.kind == "experts" and not isinstance(width, int):
                wanted.add("channels of experts")
            if (width if isinstance(width, int) else width[0]) < sublayer.num_units:
                wanted.add(units[sublayer.kind])
    if left := wanted - method.removes:
        raise ConfigError(
            f"the method {method.config.method} cannot remove {' or '.join(sorted(left))} of this "
            f"model, only {' and '.join(sorted(method.removes))}",
            hint="choose other --expert-units, --attention-share 0, or another --method; layers "
            "without experts stay whole with --layer-ratios",
        )


def open_inputs(
    source: Source, config: PruneConfig, device: torch.device, progress: Progress
) -> Inputs:
    """Open a model without reading its weights.

    Raises
    ------
    SlimGPTError
        If a file of the model is missing or broken, or the ratio or target is not feasible.
    """
    stopwatch, method = Stopwatch(), make_method(config)
    base_config = load_config(source)
    if not has_language_head(base_config):
        _check_headless(source, config)
    shapes = tuple(shapes_of(base_config))
    dropped = last_layers(base_config, config)
    target = target_of_kept(source, base_config, config, dropped)
    # Raises if the ratio is not feasible.
    widths = initial_widths(shapes, base_config, config, target, dropped)
    _check_method(method, *without_dropped(shapes, widths))
    if is_main():
        check_family(base_config)
        check_same_layers(base_config, dropped)
    model_config = method.extend_config(base_config)
    tokenizer = load_tokenizer(source)
    generation_config = load_generation_config(source, model_config)
    weights = open_weights(source, model_config, config.dtype)
    skeleton = build_skeleton(model_config, weights.dtype)
    weights.check(skeleton, adds_biases=model_config is not base_config)
    streamed = StreamedModel(skeleton, weights, device)
    seqlen = usable_seqlen(config.seqlen, model_config)
    return Inputs(
        config,
        method,
        base_config,
        shapes,
        target,
        dropped,
        streamed,
        tokenizer,
        generation_config,
        seqlen,
        stopwatch,
        progress,
    )


def identity_of(inputs: Inputs) -> dict[str, Any]:
    """Everything that determines the result, as JSON values."""
    config, weights = inputs.config, inputs.streamed.weights
    configs = {
        "model config": inputs.streamed.skeleton.config,
        "generation config": inputs.generation_config,
    }
    files = {
        "calibration file": [f for name in config.calibration for f in dataset_files(name)],
        "tokenizer file": copied_files(weights.source).values(),
    }
    return {
        "model": weights.source.title,
        **{name: sha256(c.to_json_string().encode()).hexdigest() for name, c in configs.items()},
        **{file.name: describe_file(file) for file in weights.files},
        **config.model_dump(exclude={"activation_memory", "latency_table"}),
        "target": sha256(repr(inputs.target).encode()).hexdigest(),  # with what the table says
        **{f"{kind} {f}": describe_file(f) for kind, found in files.items() for f in found},
        "device": inputs.streamed.device.type,
        "products": str(fast_dtype(inputs.streamed.device, weights.dtype)),
        **computation(),
        **versions(),
    }


def make_job(inputs: Inputs, run: Run, shared: Run) -> Job:
    """Check the memory estimate against the machine, draw the samples and choose layers to drop.

    Raises
    ------
    ConfigError
        If the machine has too little memory or disk.
    DataError
        If there are too few samples.
    """
    shapes, base_config, config = inputs.shapes, inputs.base_config, inputs.config
    widths = initial_widths(shapes, base_config, config, inputs.target, inputs.dropped)
    _warn_of_few_samples(inputs, widths)
    memory = estimate_memory(inputs, widths)
    if is_main():
        log.info("%s", memory)
        memory.check(run.output, run.size)
    if memory.mapped_experts:
        inputs.streamed.directory = run.state
    samples_NT = _samples(inputs, shared)
    job = Job(**vars(inputs), run=run, memory=memory, samples_NT=samples_NT, shared=shared)
    if config.drop_layers:
        dropped = choose_layers(job)
        source = inputs.streamed.weights.source
        target = target_of_kept(source, base_config, config, dropped)
        job = replace(job, dropped=dropped, target=target)
        widths = initial_widths(shapes, base_config, config, target, dropped)
    _score(job, run, samples_NT, widths)
    inputs.stopwatch.lap("prepare")
    return job


def estimate_memory(inputs: Inputs, widths: Sequence[BlockWidths]) -> MemoryEstimate:
    """Estimate the peak memory and the disk space of a run."""
    config, method, skeleton = inputs.config, inputs.method, inputs.streamed.skeleton
    measures = is_measured(inputs.shapes, widths, inputs.seqlen, config)
    batch_size = choose_batch_size(config.nsamples, inputs.seqlen)
    num_own = len(shard(torch.arange(config.nsamples), batch_size))
    size = skeleton.dtype.itemsize
    blocks, solvers, num_removed = list(bind(skeleton)), [], 0
    sublayers = [
        (sublayer, width)
        for block, block_widths in zip(blocks, widths, strict=True)
        for sublayer, width in zip(block.sublayers, block_widths, strict=True)
    ]
    tokens, widest = num_own * inputs.seqlen, 0
    for sublayer, width in sublayers:
        shape = sublayer.shape
        whole, kept = shape.params, shape.kept_params(width)
        num_removed += whole - kept
        if isinstance(sublayer, Experts):
            _, num_out, num_in = sublayer.weights.down_proj.shape
            # The rest of the target for all tokens, and the input of an expert that has them all.
            held = tokens * (num_out + num_in) * FLOAT32
            solvers.append(solver_bytes(num_out, num_in, num_in, True, False) + held)
            continue
        output = sublayer.output
        widest = max(widest, output.in_features)
        columns = output.in_features - sublayer.num_columns(width)
        if measures:  # and further ones
            columns = 2 * (output.in_features if shape.kind == "attention" else columns)
        sizes, has_bias = (output.out_features, output.in_features), output.bias is not None
        solvers.append(solver_bytes(*sizes, columns, method.needs_dense, has_bias))
        if method.refit_epochs and shape.kind == "ffn" and kept < whole:
            solvers.append(refit_bytes(whole, kept, size))
    activation = tokens * size
    stream = (
        activation
        * skeleton.config.get_text_config().hidden_size
        * (2 if method.needs_dense else 1)
    )
    if blocks[0].is_parallel:
        stream *= 2
    experts = [size * sub.shape.params for sub, _ in sublayers if isinstance(sub, Experts)]
    mapped = max(experts, default=0)
    if mapped <= config.activation_memory:
        mapped = 0
    block = max(sum(_held(sub, mapped > 0) for sub in block.sublayers) for block in blocks)
    if config.drop_layers:  # a dropped one beside the one before it
        block *= 2
    device, room = inputs.streamed.device, None
    others, on_host = _other_phases(inputs, measures)
    working = max(block * size + max(solvers), others)
    if device.type == "cuda":
        room = free_gpu_memory(device)[0] - working
    else:
        working = max(working, on_host)
    return MemoryEstimate(
        stream,
        place_activations(stream, activation * widest, config.activation_memory, room),
        working,
        result=(skeleton.num_parameters() - num_removed) * size,
        device=device,
        mapped_experts=mapped,
        beside=max(READ_AHEAD * block * size, on_host),
    )


def _other_phases(inputs: Inputs, measures: bool) -> tuple[int, int]:
    """Bytes that phases outside the blocks need on the device, and on the host."""
    config, skeleton = inputs.config, inputs.streamed.skeleton
    size, num_params = skeleton.dtype.itemsize, skeleton.num_parameters()
    phases = [next(skeleton.get_input_embeddings().parameters()).numel() * size]
    if measures:
        phases.append(probe_bytes(skeleton, config.nsamples, inputs.seqlen))
    if config.drop_layers:
        phases.append(choice_bytes(skeleton, config.nsamples, inputs.seqlen))
    on_host = max(phases)  # a part of each
    if not {SELF, PYDOCS}.issuperset(config.calibration):
        on_host = max(on_host, READING_BYTES)
    if SELF in config.calibration:
        phases.append(num_params * size)
    if inputs.method.needs_gradients:
        phases.append(2 * num_params * FLOAT32)
    return max(phases), on_host


def _held(sublayer: Sublayer, is_mapped: bool) -> int:
    """Parameters of a sublayer in memory at once: of mapped experts one, else all twice."""
    params = sublayer.shape.params
    if isinstance(sublayer, Experts):
        return params // sublayer.num_units if is_mapped else 2 * params
    return params if sublayer.spec.widths else 0


def _warn_of_few_samples(inputs: Inputs, widths: Sequence[BlockWidths]) -> None:
    config, shapes = inputs.config, inputs.shapes
    kept = without_dropped(shapes, widths)
    removes = any(removed_params(s, w) for s, w in zip(*kept, strict=True))
    needed = samples_needed(shapes, inputs.seqlen)
    if config.widths != "scheduled" and removes and has_experts(shapes):
        log.info("the widths follow the schedule: a sensitivity pass does not measure experts")
    elif config.widths != "scheduled" and removes and config.nsamples < needed:
        log.warning(
            "the widths stay as scheduled: to measure them takes %d samples of %d tokens at "
            "least, and there are %d",
            needed,
            inputs.seqlen,
            config.nsamples,
        )


def _samples(inputs: Inputs, run: Run) -> Tensor:
    """Draw the calibration samples, as equally as possible from each data set."""
    config, streamed = inputs.config, inputs.streamed
    num_texts, samples = len(config.calibration), []
    for index, name in enumerate(config.calibration):
        bounds = [config.nsamples * i // num_texts for i in (index, index + 1)]
        options = SampleOptions(
            bounds[1] - bounds[0], inputs.seqlen, config.seed, config.text_field
        )

        def make(name: str = name, options: SampleOptions = options) -> bytes:
            if name == SELF:
                with streamed.whole(fast_dtype(streamed.device, streamed.weights.dtype)) as model:
                    drawn = sample_from_model(model, inputs.tokenizer, options)
            else:
                drawn = calibration_tokens(name, inputs.tokenizer, options)
            return save({"tokens": drawn})

        file = GENERATED_FILE if name == SELF else f"samples-{index}.safetensors"
        samples.append(read_tensor(run.cached(file, make), "tokens"))
    return torch.cat(samples)


def _score(inputs: Inputs, run: Run, samples_NT: Tensor, widths: Sequence[BlockWidths]) -> None:
    """Compute and cache the method's whole-model scores, if it uses them."""
    method, config = inputs.method, inputs.config
    if not method.scores_model:
        return

    def make() -> bytes:
        model = inputs.streamed.skeleton
        if method.needs_gradients:
            log.info("gradients of the whole model, for the method %s", config.method)
            model = load_model(inputs.streamed.weights.source, "float32", config.device)
        return save(method.score_model(model, samples_NT, widths))

    file = run.cached(SCORES_FILE, make)
    method.scores = {name: read_tensor(file, name) for name in tensor_names(file)}
