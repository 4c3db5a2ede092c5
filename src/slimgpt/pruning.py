"""The main job: prune a model block by block, and write it as a smaller one."""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimgpt.blocks import BlockPlan
from slimgpt.calibrate import choose_batch_size, fast_dtype
from slimgpt.card import REPORT_FILE, write_card
from slimgpt.checkpoint import (
    add_older_rope_keys,
    pruned_config,
    uniform_group_counts,
    write_shards,
    write_tokenizer,
)
from slimgpt.config import PruneConfig
from slimgpt.data import (
    PYDOCS,
    READING_BYTES,
    SELF,
    calibration_tokens,
    check_dataset,
    dataset_files,
    describe_dataset,
    sample_from_model,
)
from slimgpt.distributed import from_main, is_main, own_part, process_group
from slimgpt.errors import MissingDependencyError
from slimgpt.families import attention_share, bind, with_biases
from slimgpt.files import describe_file
from slimgpt.footprint import Footprint, estimate, refit_bytes, solver_bytes
from slimgpt.importance import GLOBAL_SCORES, NEEDS_GRADIENTS
from slimgpt.model import (
    build_skeleton,
    find_device,
    find_model,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    tokenizer_files,
    usable_seqlen,
)
from slimgpt.run import GENERATED_FILE, SCORES_FILE, Run, computation, open_run, versions
from slimgpt.schedule import (
    BlockShape,
    BlockWidths,
    plan_widths,
    removed_params,
)
from slimgpt.stored import read_tensor
from slimgpt.streaming import StreamedModel
from slimgpt.survey import measured_widths, probe_bytes, samples_needed
from slimgpt.sweep import sweep
from slimgpt.weights import (
    Weights,
    open_weights,
    read_metadata,
    saved_tensors,
    tensor_names,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunePlan:
    """Widths of every block and what they amount to.

    Attributes
    ----------
    shapes : tuple of BlockShape
        What could be removed from each block.
    widths : tuple of BlockWidths
        Key/value groups and FFN channels that each block keeps.
    layer_ratios : tuple of float
        Fraction of its prunable parameters that each block loses.
    target_ratio, block_ratio, total_ratio : float
        Fraction to remove of the prunable block parameters as asked for, as planned, and what
        that is of all parameters, embeddings included.
    params_before, params_after : int
        All parameters.
    is_measured : bool
        Whether a survey decides the widths; those of a plan are what it begins with.
    """

    shapes: tuple[BlockShape, ...]
    widths: tuple[BlockWidths, ...]
    layer_ratios: tuple[float, ...]
    target_ratio: float
    block_ratio: float
    total_ratio: float
    params_before: int
    params_after: int
    is_measured: bool


@dataclass(frozen=True)
class PruneResult:
    """A finished run.

    Attributes
    ----------
    output : Path
        The directory with the pruned model.
    plan : PrunePlan
        Its widths and ratios.
    blocks : tuple of BlockPlan
        What was removed from each block, and the errors.
    report : dict
        The content of ``pruning_report.json``.
    """

    output: Path
    plan: PrunePlan
    blocks: tuple[BlockPlan, ...]
    report: dict[str, Any]


def plan(model: str, **options: Any) -> PrunePlan:
    """Work out the widths of a pruned model, without its weights.

    If the run measures the widths, these are the ones that it begins with; the sum of what they
    remove stays.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.
    **options
        The fields of `slimgpt.config.PruneConfig`.

    Raises
    ------
    SlimGPTError
        If an option is wrong, the model cannot be read or the ratio is infeasible.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.plan("smollm2-135m", ratio=0.5).params_after  # doctest: +SKIP
    81430848
    """
    config = PruneConfig.create(**options)
    return _plan(load_config(find_model(model)), config)


def prune(model: str, output: str | Path, *, restart: bool = False, **options: Any) -> PruneResult:
    """Prune a causal language model into a smaller dense one.

    Weights are read, pruned and written block by block. After an interruption the same call goes
    on where the last one stopped, and ends with the same files.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.
    output : str or Path
        Directory for the result; must not exist, be empty, or hold an interrupted run.
    restart : bool
        Begin anew even if `output` holds an interrupted run.
    **options
        The fields of `slimgpt.config.PruneConfig`, for example ``ratio=0.5``.

    Returns
    -------
    PruneResult
        Where the result lies, what was removed, and the errors.

    Raises
    ------
    SlimGPTError
        If an option, the model or the data is wrong, the machine is too small, or `output` holds
        a run with other options. Finished blocks are kept for the next call.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.prune("smollm2-135m", "slim", ratio=0.2, calibration="pydocs",
    ...               nsamples=64, seqlen=512)  # doctest: +SKIP
    """
    config = PruneConfig.create(**options)
    output = Path(output)
    source = find_model(model)
    check_inputs(config)
    with process_group(find_device(config.device)) as device:
        start = time.monotonic()
        base_config = load_config(source)
        planned = _plan(base_config, config)
        model_config = _initial_config(base_config, config)
        tokenizer = load_tokenizer(source)
        generation_config = load_generation_config(source, model_config)
        seqlen = usable_seqlen(config.seqlen, model_config)
        _warn_of_few_samples(planned, seqlen, config)
        batch_size = choose_batch_size(config.nsamples, seqlen)
        num_own = len(own_part(torch.arange(config.nsamples), batch_size))
        with open_run(output) if is_main() else nullcontext() as run:
            weights = open_weights(source, model_config, config.dtype)
            skeleton = build_skeleton(model_config, weights.dtype)
            if config.method == "flap":
                weights.add_biases(skeleton)
            streamed = StreamedModel(skeleton, weights, device)
            footprint = _footprint(streamed.skeleton, planned, num_own, seqlen, config)
            if run:
                identity = _identity(weights, model_config, generation_config, config, device)
                run.identify(identity, restart)
                if not run.is_written:
                    log.info("%s", footprint)
                    footprint.check(output, run.size)
            if not from_main(run and run.is_written):
                samples_NT = from_main(run and _samples(run, streamed, tokenizer, seqlen, config))
                scores = _scores(run, streamed, samples_NT, planned, config) if run else []
                prepared = time.monotonic() - start
                if planned.is_measured:
                    widths = measured_widths(
                        Run(output),
                        streamed,
                        samples_NT,
                        planned.shapes,
                        planned.widths,
                        config,
                        footprint,
                    )
                    planned = _plan(base_config, config, widths)
                surveyed = time.monotonic() - start - prepared
                sweep(streamed, samples_NT, planned.widths, config, footprint, Run(output), scores)
                if run:
                    log.info("saving to %s", output)
                    seconds = {"prepare": round(prepared, 3), "survey": round(surveyed, 3)}
                    report = _report(run, streamed, planned, config, seqlen, seconds)
                    _write(run, streamed, planned, config, tokenizer, generation_config, report)
            if run:
                run.publish()
        report = from_main(is_main() and json.loads((output / REPORT_FILE).read_text("utf-8")))
    blocks = tuple(map(BlockPlan.from_json, report["blocks"]))
    widths = tuple(BlockWidths(**width) for width in report["widths"])
    if widths != planned.widths:  # measured by an earlier call
        planned = _plan(base_config, config, widths)
    return PruneResult(output, planned, blocks, report)


def check_inputs(config: PruneConfig) -> None:
    """Check that the calibration data exists and the packages for the method are installed."""
    for name in config.calibration:
        check_dataset(name, "calibration")
    if config.method == "loraprune" and find_spec("peft") is None:
        raise MissingDependencyError(
            "peft", "the method 'loraprune'", "pip install 'slimgpt[recover]'"
        )


def _warn_of_few_samples(planned: PrunePlan, seqlen: int, config: PruneConfig) -> None:
    if config.widths == "measured" and planned.block_ratio > 0 and not planned.is_measured:
        log.warning(
            "the widths stay as scheduled: to measure them takes %d samples of %d tokens at least, "
            "and there are %d",
            samples_needed(planned.shapes, seqlen),
            seqlen,
            config.nsamples,
        )


def _samples(
    run: Run,
    streamed: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    config: PruneConfig,
) -> Tensor:
    """The calibration samples: those of the interrupted run, or new ones.

    Each text gives an equal number, as far as possible.
    """
    num_texts, samples = len(config.calibration), []
    for index, name in enumerate(config.calibration):
        file = GENERATED_FILE if name == SELF else f"samples-{index}.safetensors"
        if not run.has(file):
            bounds = [config.nsamples * i // num_texts for i in (index, index + 1)]
            draw = (tokenizer, bounds[1] - bounds[0], seqlen, config.seed)
            if name == SELF:
                dtype = fast_dtype(streamed.device, streamed.weights.dtype)
                with streamed.whole(dtype) as model:
                    drawn = sample_from_model(model, *draw)
            else:
                drawn = calibration_tokens(name, *draw, text_field=config.text_field)
            with run.saving(file) as temporary:
                temporary.write_bytes(save({"tokens": drawn}))
        samples.append(read_tensor(run.saved(file), "tokens"))
    return torch.cat(samples)


def _scores(
    run: Run, streamed: StreamedModel, samples: Tensor, planned: PrunePlan, config: PruneConfig
) -> list[Tensor]:
    """Scores that come from the model as a whole, if the method has such."""
    if config.method not in GLOBAL_SCORES:
        return []
    if not run.has(SCORES_FILE):
        model = streamed.skeleton
        if config.method in NEEDS_GRADIENTS:
            log.info("gradients of the whole model, for the method %s", config.method)
            model = load_model(streamed.weights.source, "float32", config.device)
        scores = GLOBAL_SCORES[config.method](model, samples, planned.widths, config.seed)
        with run.saving(SCORES_FILE) as temporary:
            temporary.write_bytes(save({f"{i:05d}": s for i, s in enumerate(scores)}))
    file = run.saved(SCORES_FILE)
    return [read_tensor(file, name) for name in sorted(tensor_names(file))]


def _footprint(
    skeleton: PreTrainedModel,
    planned: PrunePlan,
    num_samples: int,
    seqlen: int,
    config: PruneConfig,
) -> Footprint:
    size = skeleton.dtype.itemsize
    activation = num_samples * seqlen * size
    blocks = list(bind(skeleton))
    outputs = [
        (sublayer.output, (sublayer.num_units - num_keep) * sublayer.unit_size)
        for block, width in zip(blocks, planned.widths, strict=True)
        for sublayer, num_keep in (
            (block.attention, width.num_groups),
            (block.ffn, width.num_channels),
        )
    ]
    solvers = [
        # A survey looks at twice as many.
        solver_bytes(
            o.out_features,
            o.in_features,
            removed * (2 if planned.is_measured else 1),
            config.needs_dense,
        )
        for o, removed in outputs
    ]
    if config.refits:
        solvers += [
            refit_bytes(
                block.ffn.num_units * block.ffn.unit_params,
                width.num_channels * block.ffn.unit_params,
                size,
            )
            for block, width in zip(blocks, planned.widths, strict=True)
            if width.num_channels < block.ffn.num_units
        ]
    whole = next(skeleton.get_input_embeddings().parameters()).numel() * size
    if planned.is_measured:
        whole = max(whole, probe_bytes(skeleton, config.nsamples, seqlen))
    if not {SELF, PYDOCS}.issuperset(config.calibration):
        whole = max(whole, READING_BYTES)
    if SELF in config.calibration:
        whole = max(whole, planned.params_before * size)
    if config.method in NEEDS_GRADIENTS:
        whole = 2 * planned.params_before * torch.float32.itemsize
    return estimate(
        stream=activation * skeleton.config.hidden_size * (2 if config.needs_dense else 1),
        widest=activation * max(output.in_features for output, _ in outputs),
        budget=config.activation_memory,
        block=max(block.shape.params for block in blocks) * size,
        solver=max(solvers),
        whole=whole,
        product=planned.params_after * size,
    )


def _identity(
    weights: Weights,
    model_config: PreTrainedConfig,
    generation_config: GenerationConfig,
    config: PruneConfig,
    device: torch.device,
) -> dict[str, Any]:
    """All that the result depends on."""
    configs = {"model config": model_config, "generation config": generation_config}
    files = [file for name in config.calibration for file in dataset_files(name)]
    files += tokenizer_files(weights.source).values()
    return {
        "model": weights.source.title,
        **{name: sha256(c.to_json_string().encode()).hexdigest() for name, c in configs.items()},
        **{file.name: describe_file(file) for file in weights.files},
        **config.model_dump(exclude={"activation_memory"}),
        **{f"file {path}": describe_file(path) for path in files},
        "device": device.type,
        "products": str(fast_dtype(device, weights.dtype)),
        **computation(),
        **versions(),
    }


def _write(
    run: Run,
    streamed: StreamedModel,
    planned: PrunePlan,
    config: PruneConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    report: dict[str, Any],
) -> None:
    """Put the product together from the finished blocks and the tensors that stay."""
    start = time.monotonic()
    files = [run.saved(run.block_file(index)) for index in range(len(planned.widths))]
    finished = {name: file for file in files for name in tensor_names(file)}

    def read(name: str) -> Tensor:
        file = finished.get(name)
        return read_tensor(file, name) if file else streamed.weights.read(name)

    model = streamed.skeleton
    small_config = pruned_config(model.config, planned.widths, config.uniform)
    small_config.dtype = streamed.weights.dtype
    with run.product() as directory:
        small_config.save_pretrained(directory)
        add_older_rope_keys(directory)
        generation_config.save_pretrained(directory)
        write_tokenizer(streamed.weights.source, tokenizer, directory)
        write_shards(directory, saved_tensors(model), read, config.max_shard_size)
        report["seconds"]["save"] = round(time.monotonic() - start, 3)
        (directory / REPORT_FILE).write_text(json.dumps(report) + "\n", encoding="utf-8")
        write_card(directory)


def _report(
    run: Run,
    streamed: StreamedModel,
    planned: PrunePlan,
    config: PruneConfig,
    seqlen: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    files = [run.saved(run.block_file(index)) for index in range(len(planned.widths))]
    metadata = [read_metadata(file) for file in files]
    costs = [json.loads(block["cost"]) for block in metadata]
    return {
        # The report goes to the hub with the model, so it holds no local paths.
        "base_model": streamed.weights.source.title,
        "config": config.model_dump()
        | {"calibration": [Path(name).name for name in config.calibration]},
        "dtype": str(streamed.weights.dtype).removeprefix("torch."),
        "products": str(fast_dtype(streamed.device, streamed.weights.dtype)).removeprefix("torch."),
        "device": str(streamed.device),
        "calibration": {
            "data": " + ".join(describe_dataset(n, "calibration") for n in config.calibration),
            "nsamples": config.nsamples,
            "seqlen": seqlen,
        },
        **asdict(planned),
        "blocks": [json.loads(block["plan"]) for block in metadata],
        "seconds": seconds | {"prune": round(sum(cost["seconds"] for cost in costs), 3)},
        "peak_memory_bytes": max(cost["peak_memory_bytes"] or 0 for cost in costs),
        "versions": versions(),
    }


def _initial_config(model_config: PreTrainedConfig, config: PruneConfig) -> PreTrainedConfig:
    """Config of the model that is pruned: the base, with what the method adds to it."""
    return with_biases(model_config) if config.method == "flap" else model_config


def _plan(
    model_config: PreTrainedConfig,
    config: PruneConfig,
    widths: Sequence[BlockWidths] | None = None,
) -> PrunePlan:
    skeleton = build_skeleton(model_config)
    shapes = [block.shape for block in bind(skeleton)]
    uniform_groups = uniform_group_counts(model_config) if config.uniform else None
    share = config.attention_share
    widths = widths or plan_widths(
        shapes,
        config.ratio,
        config.schedule,
        config.min_ratio,
        config.multiple_of,
        uniform_groups,
        config.layer_ratios,
        attention_share(model_config) if share is None else share,
    )
    given = sum(r * s.params for r, s in zip(config.layer_ratios, shapes, strict=False))
    prunable = sum(shape.params for shape in shapes)
    removed = [removed_params(s, w) for s, w in zip(shapes, widths, strict=True)]
    product = pruned_config(_initial_config(model_config, config), widths, config.uniform)
    before, after = (m.num_parameters() for m in (skeleton, build_skeleton(product)))
    seqlen = min(config.seqlen, model_config.max_position_embeddings)
    return PrunePlan(
        shapes=tuple(shapes),
        widths=tuple(widths),
        layer_ratios=tuple(r / s.params for r, s in zip(removed, shapes, strict=True)),
        target_ratio=given / prunable if config.layer_ratios else config.ratio,
        block_ratio=sum(removed) / prunable,
        total_ratio=1 - after / before,
        params_before=before,
        params_after=after,
        is_measured=config.widths == "measured"
        and sum(removed) > 0
        and config.nsamples >= samples_needed(shapes, seqlen),
    )
