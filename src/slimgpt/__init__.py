"""SlimGPT: structured pruning of large language models.

The public names are imported on first use, so that ``import slimgpt`` costs next to nothing.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from slimgpt.benchmarking.bench import bench as bench
    from slimgpt.benchmarking.results import BenchResult as BenchResult
    from slimgpt.checkpoint.hub import push as push
    from slimgpt.checkpoint.inspection import ModelSummary as ModelSummary
    from slimgpt.checkpoint.inspection import inspect as inspect
    from slimgpt.errors import SlimGPTError as SlimGPTError
    from slimgpt.evaluation.evaluate import Evaluation as Evaluation
    from slimgpt.evaluation.evaluate import TaskResult as TaskResult
    from slimgpt.evaluation.evaluate import evaluate as evaluate
    from slimgpt.evaluation.perplexity import EvalResult as EvalResult
    from slimgpt.experiments.runner import RecipeResult as RecipeResult
    from slimgpt.experiments.runner import run_recipe as run_recipe
    from slimgpt.exporting.export import ExportResult as ExportResult
    from slimgpt.exporting.export import export as export
    from slimgpt.pruning.family_check import FamilyCheck as FamilyCheck
    from slimgpt.pruning.family_check import check as check
    from slimgpt.pruning.latency import latency as latency
    from slimgpt.pruning.latency_table import LatencyTable as LatencyTable
    from slimgpt.pruning.plan import PrunePlan as PrunePlan
    from slimgpt.pruning.plan import plan as plan
    from slimgpt.pruning.prune import PruneResult as PruneResult
    from slimgpt.pruning.prune import prune as prune
    from slimgpt.pruning.sizes import SweepPoint as SweepPoint
    from slimgpt.pruning.sizes import prune_family as prune_family
    from slimgpt.pruning.sizes import sweep as sweep
    from slimgpt.recovery.recover import RecoverResult as RecoverResult
    from slimgpt.recovery.recover import recover as recover
    from slimgpt.reporting.report import report as report

__version__ = version("slimgpt")
_HOMES = {
    "BenchResult": "benchmarking.results",
    "EvalResult": "evaluation.perplexity",
    "Evaluation": "evaluation.evaluate",
    "ExportResult": "exporting.export",
    "FamilyCheck": "pruning.family_check",
    "LatencyTable": "pruning.latency_table",
    "ModelSummary": "checkpoint.inspection",
    "PrunePlan": "pruning.plan",
    "PruneResult": "pruning.prune",
    "RecipeResult": "experiments.runner",
    "RecoverResult": "recovery.recover",
    "SlimGPTError": "errors",
    "SweepPoint": "pruning.sizes",
    "TaskResult": "evaluation.evaluate",
    "bench": "benchmarking.bench",
    "check": "pruning.family_check",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "inspect": "checkpoint.inspection",
    "latency": "pruning.latency",
    "plan": "pruning.plan",
    "prune": "pruning.prune",
    "prune_family": "pruning.sizes",
    "push": "checkpoint.hub",
    "recover": "recovery.recover",
    "register": "checkpoint.registration",
    "report": "reporting.report",
    "run_recipe": "experiments.runner",
    "sweep": "pruning.sizes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


@wrapt.when_imported("transformers")
def _register(_: Any) -> None:
    from slimgpt.checkpoint.registration import register

    register()
