"""Plot a benchmark."""

from pathlib import Path

from slimgpt.benchmarking.results import BenchResult


def plot_costs(result: BenchResult, file: Path) -> None:
    """Bars of the speeds, whiskers from the slowest round to the fastest, ideals as lines."""
    from slimgpt.presentation.figures import grouped_bars, save

    places = [f"{s.batch_size} × {s.prompt_length}" for s in result.settings]
    panels = []
    for phase in ("prefill", "decode"):
        groups = {
            f"{Path(cost.name).name} ({role})": [
                (spread.median, spread.low, spread.high)
                for spread in (getattr(getattr(s, role), phase) for s in result.settings)
            ]
            for role, cost in zip(("model", "base"), result.costs, strict=False)
        }
        targets = None
        if ideal := getattr(result, f"ideal_{phase}"):
            bases = [getattr(s.base, phase).median for s in result.settings]
            targets = f"base × {ideal:.2f}", [ideal * median for median in bases]
        labels = {"xlabel": "batch size × prompt length", "ylabel": "tokens/s", "title": phase}
        panels.append(grouped_bars(places, groups, targets, **labels))
    save(panels, file, f"{result.engine}, {result.costs[0].dtype}, {result.device}")
