"""SlimGPT: structured pruning of large language models.

The public names are imported on first use, so that ``import slimgpt`` costs next to nothing.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from slimgpt.benchmarking import BenchResult, bench
    from slimgpt.errors import SlimGPTError
    from slimgpt.evaluation import EvalResult, Evaluation, TaskResult, evaluate
    from slimgpt.experiments import RecipeResult, run_recipe
    from slimgpt.exporting import ExportResult, export
    from slimgpt.inspection import ModelSummary, inspect
    from slimgpt.pruning import PrunePlan, PruneResult, plan, prune
    from slimgpt.recovery import RecoverResult, recover
    from slimgpt.reporting import report

__version__ = version("slimgpt")
__all__ = [
    "BenchResult",
    "EvalResult",
    "Evaluation",
    "ExportResult",
    "ModelSummary",
    "PrunePlan",
    "PruneResult",
    "RecipeResult",
    "RecoverResult",
    "SlimGPTError",
    "TaskResult",
    "bench",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "prune",
    "recover",
    "report",
    "run_recipe",
]

_HOMES = {
    "BenchResult": "benchmarking",
    "EvalResult": "evaluation",
    "Evaluation": "evaluation",
    "ExportResult": "exporting",
    "ModelSummary": "inspection",
    "PrunePlan": "pruning",
    "PruneResult": "pruning",
    "RecipeResult": "experiments",
    "RecoverResult": "recovery",
    "SlimGPTError": "errors",
    "TaskResult": "evaluation",
    "bench": "benchmarking",
    "evaluate": "evaluation",
    "export": "exporting",
    "inspect": "inspection",
    "plan": "pruning",
    "prune": "pruning",
    "recover": "recovery",
    "report": "reporting",
    "run_recipe": "experiments",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


@wrapt.when_imported("transformers")
def _register(_: Any) -> None:
    from slimgpt.registry import register

    register()
