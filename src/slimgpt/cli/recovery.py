"""Prune a model and recover the result, in one command. Pruning and recovery are apart."""

import logging
import re
from pathlib import Path
from typing import Any

import slimgpt
from slimgpt.config import PruneConfig, RecoverConfig
from slimgpt.errors import ConfigError, OtherRunError
from slimgpt.runtime.progress import Progress

log = logging.getLogger(__name__)

_MINUTES = {"min": 1, "h": 60}


def recovery_options(model: str, pruning: PruneConfig, budget: str) -> dict[str, Any]:
    """Choose the options of the recovery that follows a pruning.

    Parameters
    ----------
    model : str
        The dense model, which is the teacher.
    pruning : PruneConfig
        Its texts are trained on. The held-out text is the first of them that has a part for
        evaluation, or else pydocs.
    budget : str
        A number of tokens, or a time with the unit min or h.

    Raises
    ------
    ConfigError
        If the budget is neither, or out of range.
    """
    options = {
        "method": "distill",
        "teacher": model,
        "data": pruning.calibration,
        "eval_data": _held_out_text(pruning.calibration),
        "text_field": pruning.text_field,
        "device": pruning.device,
        "seed": pruning.seed,
        "prompts": pruning.prompts,
        **_parse(budget),
    }
    RecoverConfig.create(**options)
    return options


def _parse(budget: str) -> dict[str, Any]:
    time = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(min|h)", budget.strip())
    if time:
        return {"minutes": float(time[1]) * _MINUTES[time[2]]}
    if re.fullmatch(r"[\d.,_]+ ?[kKMbBtT]?", budget.strip()):  # 30m may be meant as minutes
        return {"tokens": budget.strip()}
    raise ConfigError(
        f"--recover {budget!r} is neither a number of tokens nor a time",
        hint="give tokens as in --recover 1M, or a time as in --recover 30min or --recover 1.5h",
    )


def _held_out_text(texts: tuple[str, ...]) -> str:
    """Choose a text of which a part is not trained on."""
    from slimgpt.data.datasets import HUB_DATASETS, PYDOCS, SELF

    def has_part(name: str) -> bool:
        hub = HUB_DATASETS.get(name)
        return name != SELF and (hub is None or "evaluation" in hub.splits)

    return next(filter(has_part, texts), PYDOCS)


def pruned_directory(output: Path) -> Path:
    """Directory of the pruned model, beside the recovered one."""
    named = output if output.name not in ("", "..") else output.resolve()
    return Path(f"{named}-pruned")


def prune_and_recover(
    model: str,
    output: Path,
    pruning: dict[str, Any],
    recovery: dict[str, Any],
    *,
    restart: bool,
    progress: Progress,
) -> "tuple[slimgpt.PruneResult, slimgpt.RecoverResult]":
    """Prune into ``OUTPUT-pruned`` and recover into `output`, from the first unfinished step.

    Parameters
    ----------
    model : str
        The dense model.
    output : Path
        Directory for the recovered model.
    pruning, recovery : dict
        Options of `slimgpt.prune` and `slimgpt.recover`.
    restart : bool
        Discard interrupted runs; a finished result stays.
    progress : Progress
        As in both.

    Raises
    ------
    SlimGPTError
        As in both. What is wrong in the options, data or directories of either is found before any
        work.
    """
    from slimgpt.models.device import find_device
    from slimgpt.models.source import find_model
    from slimgpt.pruning.prune import is_finished, read_result
    from slimgpt.recovery.recover import check_recovery, find_recovered
    from slimgpt.runtime.distributed import process_group
    from slimgpt.runtime.run_directory import Run

    config, asked = PruneConfig.create(**pruning), RecoverConfig.create(**recovery)
    source, run, pruned = find_model(model), Run(output), Run(pruned_directory(output))
    # One process group for both: torchrun's store has no place for a second one.
    with process_group(find_device(config.device)):
        found = find_recovered(output, asked)
        if found and is_finished(run, source, config):
            log.info("%s is finished", output)
            return read_result(pruned if is_finished(pruned, source, config) else run), found
        run.check()
        is_pruned = is_finished(pruned, source, config)
        if is_pruned:
            log.info("%s is finished", pruned.output)
            result = read_result(pruned)
        else:
            pruned.check()
            if (run.has_begun or run.is_written) and not restart:
                raise OtherRunError(
                    f"{output} holds an interrupted run, but {pruned.output} has no pruned model",
                    hint="repeat the command that it is from, choose another --output, or "
                    "discard it with --restart",
                )
            check_recovery(model, asked)
            result = slimgpt.prune(
                model, pruned.output, restart=restart, progress=progress, **pruning
            )
        log.info("the pruned model is in %s; recovering it", pruned.output)
        options = {"restart": restart, "progress": progress, **recovery}
        return result, slimgpt.recover(str(pruned.output), output, **options)
