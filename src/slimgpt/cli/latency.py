"""Check the prediction of a latency target on the real models."""

from dataclasses import dataclass

import slimgpt


@dataclass(frozen=True)
class LatencyCheck:
    """Latency of a pruned model, relative to the dense model's.

    Attributes
    ----------
    predicted, measured : float
        By the latency table; by `slimgpt.bench`, the median over the rounds.
    bench : BenchResult
        All measurements.
    """

    predicted: float
    measured: float
    bench: "slimgpt.BenchResult"

    @property
    def line(self) -> str:
        """Say what was predicted and what was measured."""
        return (
            f"latency: {self.predicted:.3f}x of the dense model's predicted, "
            f"{self.measured:.3f}x measured"
        )


def check_latency(model: str, result: "slimgpt.PruneResult") -> LatencyCheck:
    """Measure the dense and the pruned model in turns, as the latency was predicted.

    Parameters
    ----------
    model : str
        Name of the dense model.
    result : PruneResult
        A run with ``target_latency``, for this machine.
    """
    from slimgpt.models.loading import load_config
    from slimgpt.models.source import find_model
    from slimgpt.pruning.latency import default_context

    report, context = result.report, default_context(load_config(find_model(model)))
    measured = slimgpt.bench(
        str(result.output),
        against=model,
        prompt_length=context,
        new_tokens=min(64, max(context, 2)),
        dtype=report["dtype"],
        device=report["config"]["device"],
    )
    (setting,) = measured.settings
    phase = report["config"]["latency_phase"]
    speedup = setting.decode_speedup if phase == "decode" else setting.prefill_speedup
    assert speedup is not None
    return LatencyCheck(report["target"]["reached"], 1 / speedup.median, measured)
