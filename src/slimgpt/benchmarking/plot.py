"""Plot the results of a benchmark."""

from pathlib import Path

from slimgpt.benchmarking.results import BenchResult


def plot_costs(result: BenchResult, file: Path) -> None:
    """Plot speeds as bars, with whiskers from the slowest to the fastest round; ideals as lines."""
    from slimgpt.presentation.figures import grouped_bars, save

    names = {
        role: Path(c.name).name for role, c in zip(("model", "base"), result.costs, strict=False)
    }
    places = [f"{s.batch_size} × {s.prompt_length}" for s in result.settings]
    plots = []
    for phase in ("prefill", "decode"):
        spreads = {
            role: [getattr(getattr(s, role), phase) for s in result.settings] for role in names
        }
        groups = {
            f"{name} ({role})": [(s.low, s.median, s.high) for s in spreads[role]]
            for role, name in names.items()
        }
        ideal, targets = getattr(result, f"ideal_{phase}"), None
        if ideal:
            targets = f"base × {ideal:.2f}", [ideal * s.median for s in spreads["base"]]
        labels = {"xlabel": "batch size × prompt length", "ylabel": "tokens/s", "title": phase}
        plots.append(grouped_bars(groups, targets, places, **labels))
    save(plots, file, f"{result.engine}, {result.costs[0].dtype}, {result.device}")
