"""Prune a model block by block and write the result as a checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from slimgpt.checkpoint.results import REPORT_FILE
from slimgpt.config import PruneConfig
from slimgpt.models.device import find_device
from slimgpt.models.source import Source, find_model
from slimgpt.presentation import html
from slimgpt.pruning.allocators import allocate
from slimgpt.pruning.decisions import BlockPlan
from slimgpt.pruning.inputs import check_inputs, identity_of, make_job, open_inputs
from slimgpt.pruning.job import Inputs
from slimgpt.pruning.plan import PrunePlan
from slimgpt.pruning.result import reported_options, write_result
from slimgpt.pruning.sequential import sequential_pass
from slimgpt.runtime.distributed import broadcast, is_main, process_group
from slimgpt.runtime.progress import Progress, no_progress
from slimgpt.runtime.run_directory import Run, open_run


@dataclass(frozen=True)
class PruneResult:
    """The result of a pruning run.

    Attributes
    ----------
    output : Path
        The directory with the pruned model.
    plan : PrunePlan
        Its widths and ratios.
    blocks : tuple of BlockPlan
        The kept units of each block, and the errors.
    report : dict
        The content of ``pruning_report.json``.
    """

    output: Path
    plan: PrunePlan
    blocks: tuple[BlockPlan, ...]
    report: dict[str, Any]

    def _repr_html_(self) -> str:
        errors: dict[str, list[tuple[int, float]]] = {}
        for index, block in enumerate(self.blocks):
            for sublayer in block.sublayers:
                if index not in self.plan.dropped:
                    errors.setdefault(sublayer.kind, []).append((index, sublayer.relative_error))
        return html.page(
            html.rows([("Pruned model", str(self.output))]),
            *self.plan.html_parts(),
            html.chart("Relative error of each sublayer", "curves", errors, percent=True),
        )


def prune(
    model: str,
    output: str | Path,
    *,
    restart: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> PruneResult:
    """Prune a causal language model into a smaller dense one.

    Weights are read, pruned and written block by block. After an interruption, the same call
    continues with the first unfinished block and writes the same files.

    Parameters
    ----------
    model : str
        A hub id, a local directory, a local ``.gguf`` file, or ``smollm2-135m``.
    output : str or Path
        Directory for the result. It must not exist, be empty, or hold an interrupted run.
    restart : bool
        Discard an interrupted run in `output` and start over.
    progress : Progress
        Called after each block of a pass, see `slimgpt.runtime.progress`.
    **options
        The fields of `slimgpt.config.PruneConfig`, for example ``ratio=0.5``.

    Returns
    -------
    PruneResult
        The output directory, the widths, the kept units and the errors.

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
    source = find_model(model)
    check_inputs(config)
    with process_group(find_device(config.device)) as device, open_run(Path(output)) as run:
        inputs = open_inputs(source, config, device, progress)
        if is_main():
            run.identify(identity_of(inputs), restart)
        finish(inputs, run, run)
        return read_result(run)


def finish(inputs: Inputs, run: Run, shared: Run) -> None:
    """Prune a model, from the first step that `run` does not have; `shared` as in `Job`."""
    if not run.is_finished():
        job = make_job(inputs, run, shared)
        widths = allocate(job)
        sequential_pass(job, widths)
        job.stopwatch.lap("prune")
        write_result(job, widths)
    run.publish()


def is_finished(run: Run, source: Source, config: PruneConfig) -> bool:
    """Whether a directory has a finished result of this model with these options.

    Raises
    ------
    OtherRunError
        If it has one of another model or with other options.
    """
    if not broadcast(is_main() and run.is_complete and (run.output / REPORT_FILE).is_file()):
        return False
    report = read_result(run).report
    asked = reported_options(config) | {"model": source.title}
    run.check_made_with(asked, report["config"] | {"model": report["base_model"]})
    return True


def read_result(run: Run) -> PruneResult:
    """Read what a finished run has written."""
    report = broadcast(is_main() and json.loads((run.output / REPORT_FILE).read_text("utf-8")))
    plan = TypeAdapter(PrunePlan).validate_python(report)
    blocks = TypeAdapter(tuple[BlockPlan, ...]).validate_python(report["blocks"])
    return PruneResult(run.output, plan, blocks, report)
