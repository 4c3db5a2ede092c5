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
from slimgpt.config import PruneConfig
from slimgpt.data.datasets import SELF, check_dataset, dataset_files
from slimgpt.data.prompts import read_prompts
from slimgpt.data.samples import SampleOptions, calibration_tokens
from slimgpt.data.self_generated import answer_prompts, sample_from_model
from slimgpt.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from slimgpt.methods.base import Method
from slimgpt.methods.registry import METHODS, make_method
from slimgpt.models.device import fast_dtype
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
from slimgpt.models.tokenizer import copied_files, load_tokenizer
from slimgpt.models.weights import open_weights, tensor_names
from slimgpt.pruning.depth import check_same_layers, choose_layers
from slimgpt.pruning.estimate import check_memory, estimate_memory
from slimgpt.pruning.family_check import check_family
from slimgpt.pruning.job import Inputs, Job
from slimgpt.pruning.plan import (
    initial_widths,
    last_layers,
    shapes_of,
    target_of_kept,
    without_dropped,
)
from slimgpt.runtime.distributed import is_main
from slimgpt.runtime.environment import Stopwatch, computation, versions
from slimgpt.runtime.files import describe_file
from slimgpt.runtime.progress import Progress
from slimgpt.runtime.run_directory import GENERATED_FILE, SCORES_FILE, Run

log = logging.getLogger(__name__)


def check_inputs(config: PruneConfig) -> None:
    """Check that the calibration data exists and the packages for the method are installed."""
    for name in config.sources:
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
        "calibration file": [f for name in config.sources for f in dataset_files(name)],
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
    check_memory(memory, run)
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
    config = inputs.config
    num_texts, samples = len(config.calibration), []
    for index, name in enumerate(config.calibration):
        bounds = [config.nsamples * i // num_texts for i in (index, index + 1)]
        options = SampleOptions(
            bounds[1] - bounds[0], inputs.seqlen, config.seed, config.text_field
        )

        def make(name: str = name, options: SampleOptions = options) -> bytes:
            if name == SELF:
                drawn = _own_text(inputs, options)
            else:
                drawn = calibration_tokens(name, inputs.tokenizer, options)
            return save({"tokens": drawn})

        file = GENERATED_FILE if name == SELF else f"samples-{index}.safetensors"
        samples.append(read_tensor(run.cached(file, make), "tokens"))
    return torch.cat(samples)


def _own_text(inputs: Inputs, options: SampleOptions) -> Tensor:
    """Have the dense model write samples: from nothing, or answers with their prompts."""
    streamed, tokenizer, name = inputs.streamed, inputs.tokenizer, inputs.config.prompts
    prompts = name and read_prompts(name, tokenizer, options.seqlen, options.text_field)
    with streamed.whole(fast_dtype(streamed.device, streamed.weights.dtype)) as model:
        if prompts:
            return answer_prompts(model, tokenizer, prompts, options).tokens
        return sample_from_model(model, tokenizer, options)


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
