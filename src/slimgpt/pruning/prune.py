"""The main job: prune a model block by block, and write it as a smaller one."""

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.calibration.activations import choose_batch_size
from slimgpt.checkpoint.results import REPORT_FILE
from slimgpt.config import PruneConfig
from slimgpt.models.device import find_device
from slimgpt.models.loading import (
    build_skeleton,
    load_config,
    load_generation_config,
    usable_seqlen,
)
from slimgpt.models.source import find_model
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.models.weights import open_weights
from slimgpt.pruning.decisions import BlockPlan
from slimgpt.pruning.inputs import (
    calibration_samples,
    check_inputs,
    global_scores,
    identity_of,
)
from slimgpt.pruning.memory import footprint_of
from slimgpt.pruning.plan import PrunePlan, initial_config, make_plan, warn_of_few_samples
from slimgpt.pruning.product import make_report, write_product
from slimgpt.pruning.sensitivity import measured_widths
from slimgpt.pruning.sequential import sweep
from slimgpt.runtime.distributed import from_main, is_main, own_part, process_group
from slimgpt.runtime.progress import Progress, no_progress
from slimgpt.runtime.run_directory import Run, open_run

log = logging.getLogger(__name__)


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


def prune(
    model: str,
    output: str | Path,
    *,
    restart: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> PruneResult:
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
    progress : Progress
        Called after each block of a pass, see `slimgpt.runtime.progress`.
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
        planned = make_plan(base_config, config)
        model_config = initial_config(base_config, config)
        tokenizer = load_tokenizer(source)
        generation_config = load_generation_config(source, model_config)
        seqlen = usable_seqlen(config.seqlen, model_config)
        warn_of_few_samples(planned, seqlen, config)
        batch_size = choose_batch_size(config.nsamples, seqlen)
        num_own = len(own_part(torch.arange(config.nsamples), batch_size))
        with open_run(output) if is_main() else nullcontext() as run:
            weights = open_weights(source, model_config, config.dtype)
            skeleton = build_skeleton(model_config, weights.dtype)
            if config.method == "flap":
                weights.add_biases(skeleton)
            streamed = StreamedModel(skeleton, weights, device)
            footprint = footprint_of(streamed.skeleton, planned, num_own, seqlen, config)
            if run:
                identity = identity_of(weights, model_config, generation_config, config, device)
                run.identify(identity, restart)
                if not run.is_written:
                    log.info("%s", footprint)
                    footprint.check(output, run.size)
            if not from_main(run and run.is_written):
                samples_NT = from_main(
                    run and calibration_samples(run, streamed, tokenizer, seqlen, config)
                )
                scores = global_scores(run, streamed, samples_NT, planned, config) if run else []
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
                        progress,
                    )
                    planned = make_plan(base_config, config, widths)
                surveyed = time.monotonic() - start - prepared
                sweep(
                    streamed,
                    samples_NT,
                    planned.widths,
                    config,
                    footprint,
                    Run(output),
                    scores,
                    progress=progress,
                )
                if run:
                    log.info("saving to %s", output)
                    seconds = {"prepare": round(prepared, 3), "survey": round(surveyed, 3)}
                    report = make_report(run, streamed, planned, config, seqlen, seconds)
                    write_product(
                        run, streamed, planned, config, tokenizer, generation_config, report
                    )
            if run:
                run.publish()
        report = from_main(is_main() and json.loads((output / REPORT_FILE).read_text("utf-8")))
    blocks = tuple(map(BlockPlan.from_json, report["blocks"]))
    widths = tuple(BlockWidths(**width) for width in report["widths"])
    if widths != planned.widths:  # measured by an earlier call
        planned = make_plan(base_config, config, widths)
    return PruneResult(output, planned, blocks, report)
