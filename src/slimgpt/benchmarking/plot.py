"""Plot a benchmark."""

from pathlib import Path

from slimgpt.benchmarking.results import BenchResult
from slimgpt.runtime.files import replacing, writing


def plot_costs(result: BenchResult, file: Path) -> None:
    """Bars of the speeds, whiskers from the slowest round to the fastest, ideals as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    labels = [f"{s.batch_size} × {s.prompt_length}" for s in result.settings]
    columns = [("model", result.costs[0].name), *(("base", c.name) for c in result.costs[1:])]
    for axes, (kind, ideal) in zip(
        figure.subplots(1, 2),
        (("prefill", result.ideal_prefill), ("decode", result.ideal_decode)),
        strict=True,
    ):
        for offset, (column, name) in enumerate(columns):
            spreads = [getattr(getattr(s, column), kind) for s in result.settings]
            medians = [s.median for s in spreads]
            whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            places = [
                index + (offset - (len(columns) - 1) / 2) * 0.4 for index in range(len(labels))
            ]
            axes.bar(places, medians, 0.36, yerr=whiskers, capsize=3, label=Path(name).name)
            if column == "base" and ideal:
                targets = [ideal * median for median in medians]
                axes.hlines(
                    targets,
                    [place - 0.58 for place in places],
                    [place - 0.22 for place in places],
                    colors="black",
                    linestyles="dashed",
                    label=f"base × {ideal:.2f}",
                )
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("batch size × prompt length")
        axes.set_ylabel("tokens/s")
        axes.set_title(kind)
        axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
        axes.legend()
    figure.suptitle(f"{result.engine}, {result.costs[0].dtype}, {result.device}")
    with writing(file), replacing(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:])
