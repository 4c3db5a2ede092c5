"""The main job: prune a model block by block, and write it as a smaller one.

Layer-wise structured pruning as in SlimGPT (Ling, Wang & Liu 2024, arXiv 2412.18110, algorithm 1):
blocks are pruned in order, each calibrated on the outputs of the pruned blocks before it.
"""

import json
import logging
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt import obs
from slimgpt.calibrate import Activations, Stream, embed, pass_through, propagate
from slimgpt.card import REPORT_FILE, write_card
from slimgpt.checkpoint import pruned_config, save_checkpoint, uniform_group_counts
from slimgpt.config import PruneConfig
from slimgpt.data import (
    SELF,
    calibration_tokens,
    check_dataset,
    describe_dataset,
    sample_from_model,
)
from slimgpt.errors import NumericalError
from slimgpt.families import Block, Sublayer, bind
from slimgpt.model import (
    Source,
    build_skeleton,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
)
from slimgpt.run import peak_memory, staging, writing
from slimgpt.schedule import BlockWidths, plan_widths, removed_params
from slimgpt.shrink import shrink_sublayer, unit_columns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunePlan:
    """Widths of every block and what they amount to, known before any weight is read.

    Attributes
    ----------
    widths : tuple of BlockWidths
        Key/value groups and FFN channels that each block keeps.
    layer_ratios : tuple of float
        Fraction of its prunable parameters that each block loses.
    target_ratio, block_ratio, total_ratio : float
        Fraction to remove of the prunable block parameters as asked for, as planned, and what
        that is of all parameters, embeddings included.
    params_before, params_after : int
        All parameters.
    """

    widths: tuple[BlockWidths, ...]
    layer_ratios: tuple[float, ...]
    target_ratio: float
    block_ratio: float
    total_ratio: float
    params_before: int
    params_after: int


@dataclass(frozen=True)
class SublayerPlan:
    """What was decided for one sublayer.

    Attributes
    ----------
    keep : tuple of int
        Units kept: key/value groups or FFN channels, sorted.
    error, relative_error : float
        Mean squared change of the sublayer's output over the calibration tokens, E‖Δy‖², and the
        same over E‖y‖².
    damping : float
        Damping that the Hessian needed; 0 where nothing was removed.
    """

    keep: tuple[int, ...]
    error: float
    relative_error: float
    damping: float


@dataclass(frozen=True)
class BlockPlan:
    """What was decided for one block."""

    block: int
    attention: SublayerPlan
    ffn: SublayerPlan


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
    81435456
    """
    config = PruneConfig.create(**options)
    return _plan(build_skeleton(load_config(find_model(model))), config)


def prune(model: str, output: str | Path, **options: Any) -> PruneResult:
    """Prune a causal language model into a smaller dense one.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.
    output : str or Path
        Directory for the result; must not exist, or be empty.
    **options
        The fields of `slimgpt.config.PruneConfig`, for example ``ratio=0.5``.

    Returns
    -------
    PruneResult
        Where the result lies, what was removed, and the errors.

    Raises
    ------
    SlimGPTError
        If an option, the model or the data is wrong; nothing is left half-written then.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.prune("smollm2-135m", "slim", ratio=0.2, calibration="pydocs",
    ...               nsamples=64, seqlen=512)  # doctest: +SKIP
    """
    config = PruneConfig.create(**options)
    output = Path(output)
    source = find_model(model)
    check_dataset(config.calibration, "calibration")
    model_config = load_config(source)
    planned = _plan(build_skeleton(model_config), config)
    with staging(output) as directory:
        laps = _Laps()
        longest = model_config.max_position_embeddings
        dense, tokenizer, samples = _load(source, config, longest, laps)
        blocks = prune_blocks(dense, samples, planned.widths, config)
        laps.end("prune")
        log.info("saving to %s", output)
        small_config = pruned_config(dense.config, planned.widths, config.uniform)
        with writing(output):
            save_checkpoint(dense, tokenizer, small_config, directory)
            laps.end("save")
            report = _report(source, config, dense, samples, planned, blocks, laps.seconds)
            (directory / REPORT_FILE).write_text(json.dumps(report) + "\n", encoding="utf-8")
            write_card(directory)
    return PruneResult(output, planned, tuple(blocks), report)


def prune_blocks(
    model: PreTrainedModel, samples: Tensor, widths: tuple[BlockWidths, ...], config: PruneConfig
) -> list[BlockPlan]:
    """Prune a live model in place, block by block.

    Parameters
    ----------
    model : PreTrainedModel
        A dense model of a supported family.
    samples : Tensor
        int64, (nsamples, seqlen), calibration tokens.
    widths : tuple of BlockWidths
        What each block keeps.
    config : PruneConfig
        Options of the method.

    Returns
    -------
    list of BlockPlan
        The model's forward pass is that of the pruned model afterwards; its config is not changed.

    Raises
    ------
    NumericalError
        If a Hessian cannot be factorised; names the block and the sublayer.
    """
    start = time.monotonic()
    log.info("calibrating on %d samples of %d tokens", *samples.shape)
    stream = embed(model, samples)
    plans = []
    for block, width in zip(bind(model), widths, strict=True):
        attention = _prune_sublayer(block, block.attention, width.num_groups, stream, config)
        ffn = _prune_sublayer(block, block.ffn, width.num_channels, stream, config)
        plans.append(BlockPlan(block.index, attention, ffn))
        elapsed = time.monotonic() - start
        log.info(
            "block %d/%d: kv groups %d→%d, error %.4f; channels %d→%d, error %.4f; %.0f s left",
            len(plans),
            len(widths),
            block.attention.num_units,
            width.num_groups,
            attention.relative_error,
            block.ffn.num_units,
            width.num_channels,
            ffn.relative_error,
            elapsed / len(plans) * (len(widths) - len(plans)),
        )
    return plans


def _load(
    source: Source, config: PruneConfig, longest: int, laps: "_Laps"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Tensor]:
    """The dense model, its tokenizer and the calibration samples; a bad text fails first."""
    seqlen = min(config.seqlen, longest)
    if seqlen < config.seqlen:
        log.warning("seqlen %d is beyond the model's context: %d is used", config.seqlen, seqlen)
    tokenizer = load_tokenizer(source)
    draw = (tokenizer, config.nsamples, seqlen, config.seed)
    samples = None
    if config.calibration != SELF:
        samples = calibration_tokens(config.calibration, *draw, text_field=config.text_field)
        laps.end("data")
    dense = load_model(source, config.dtype, config.device)
    laps.end("load")
    if samples is None:
        samples = sample_from_model(dense, *draw)
        laps.end("data")
    return dense, tokenizer, samples


def _prune_sublayer(
    block: Block, sublayer: Sublayer, num_keep: int, stream: Stream, config: PruneConfig
) -> SublayerPlan:
    """Collect, decide, compensate, propagate, shrink."""
    if num_keep == sublayer.num_units:
        pass_through(block, sublayer, stream)
        return SublayerPlan(tuple(range(num_keep)), 0.0, 0.0, 0.0)

    activations = Activations(block, sublayer, stream, config.activation_memory)
    hessian = activations.hessian_II
    weight, bias = sublayer.output.weight, sublayer.output.bias
    try:
        problem = obs.prepare(
            weight.to(hessian.device), hessian, config.damping, config.damping_mode
        )
    except NumericalError as err:
        raise NumericalError(f"block {block.index}, {sublayer.kind}: {err}", hint=err.hint) from err
    if problem.damping > config.damping:
        log.warning(
            "block %d, %s: the Hessian is singular, so its damping was raised to %g",
            block.index,
            sublayer.kind,
            problem.damping,
        )
    kept_units = _select(problem, sublayer, num_keep, config)
    columns = unit_columns(kept_units, sublayer.unit_size)
    new_weight = obs.compensate(problem.weight_OI, problem.hessian_II, columns)
    error, power = obs.output_error(problem.weight_OI, hessian, columns, new_weight)
    new_weight, columns = new_weight.to(weight), columns.to(weight.device)
    propagate(stream, activations, columns, new_weight, bias)
    shrink_sublayer(sublayer, kept_units.to(weight.device), new_weight)
    relative = error / power if power else 0.0
    return SublayerPlan(tuple(kept_units.tolist()), error, relative, problem.damping)


def _select(problem: obs.Problem, sublayer: Sublayer, num_keep: int, config: PruneConfig) -> Tensor:
    """Indices of the units to keep, sorted."""
    matrices = problem.weight_OI, problem.inverse_II
    num_remove = sublayer.num_units - num_keep
    if sublayer.kind == "attention":
        removed = obs.eliminate_units(*matrices, num_remove, sublayer.unit_size, config.head_error)
    elif config.channel_selection == "greedy":
        removed = obs.eliminate_channels(*matrices, num_remove)
    else:
        removed = obs.eliminate_channel_groups(
            *matrices, num_remove, config.min_group_size, config.max_group_size
        )
    keep = torch.ones(sublayer.num_units, dtype=torch.bool, device=removed.order_R.device)
    keep[removed.order_R] = False
    return keep.nonzero().squeeze(1)


def _plan(skeleton: PreTrainedModel, config: PruneConfig) -> PrunePlan:
    shapes = [block.shape for block in bind(skeleton)]
    uniform_groups = uniform_group_counts(skeleton.config) if config.uniform else None
    widths = plan_widths(
        shapes, config.ratio, config.schedule, config.min_ratio, config.multiple_of, uniform_groups
    )
    removed = [removed_params(s, w) for s, w in zip(shapes, widths, strict=True)]
    total = skeleton.num_parameters()
    return PrunePlan(
        widths=tuple(widths),
        layer_ratios=tuple(r / s.params for r, s in zip(removed, shapes, strict=True)),
        target_ratio=config.ratio,
        block_ratio=sum(removed) / sum(shape.params for shape in shapes),
        total_ratio=sum(removed) / total,
        params_before=total,
        params_after=total - sum(removed),
    )


class _Laps:
    """Seconds that each phase of a run took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = round(now - self._start, 3)
        self._start = now


def _report(
    source: Source,
    config: PruneConfig,
    model: PreTrainedModel,
    samples: Tensor,
    planned: PrunePlan,
    blocks: list[BlockPlan],
    seconds: dict[str, float],
) -> dict[str, Any]:
    nsamples, seqlen = samples.shape
    packages = ("slimgpt", "torch", "transformers", "safetensors")
    return {
        # The report goes to the hub with the model, so it holds no local paths.
        "base_model": source.title,
        "config": config.model_dump() | {"calibration": Path(config.calibration).name},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "calibration": {
            "data": describe_dataset(config.calibration, "calibration"),
            "nsamples": nsamples,
            "seqlen": seqlen,
        },
        **asdict(planned),
        "blocks": [asdict(block) for block in blocks],
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
    }
