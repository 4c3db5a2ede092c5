"""Charts in a common style, written to files or inline in a page.

An inline chart is SVG in two widths, with colours from the page's style sheet. The page shows
``.wide`` or ``.narrow``, whichever fits, so that text has the same size on a desktop and on a
phone. In inline charts, one Matplotlib point is one CSS pixel.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path

import numpy as np
from cycler import cycler
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from slimgpt.runtime.files import replacing, writing

# Colours by the name of their variable in the page's style sheet.
COLORS = {
    "ink": "#1b1f24",
    "muted": "#59626d",
    "line": "#dde1e6",
    "faint": "#d3d9e1",
    "series-1": "#2463c9",
    "series-2": "#b8560b",
    "series-3": "#2e7d50",
}

_SERIES = [color for name, color in COLORS.items() if name.startswith("series")]

_WIDTHS = {"wide": 720, "narrow": 340}

_STYLE = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
    "font.size": 12,
    "axes.labelcolor": COLORS["muted"],
    "axes.edgecolor": COLORS["line"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=_SERIES),
    "grid.color": COLORS["line"],
    "lines.linewidth": 2,
    "lines.markersize": 4,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": COLORS["ink"],
    "patch.linewidth": 0.8,
    "figure.constrained_layout.h_pad": 0.1,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.handlelength": 1.5,
}


Points = Sequence[tuple[float, float]]

Plot = Callable[[Axes], None]


def bars(
    values: Mapping[str, Sequence[float]],
    level: tuple[str, float] | None = None,
    percent: bool = False,
) -> Plot:
    """Plot a bar for each block.

    Parameters
    ----------
    values : mapping of str to sequence of float
        Name and heights of overlapping bars. The first are in front, in colour.
    level : tuple of str and float, optional
        Name and height of a horizontal line.
    percent : bool
        Whether the heights are fractions to show as percentages.
    """

    def plot(axes: Axes) -> None:
        looks = ((_SERIES[0], 2), (COLORS["faint"], 1))
        for (name, heights), (color, zorder) in zip(values.items(), looks, strict=False):
            axes.bar(range(len(heights)), heights, 0.78, color=color, label=name, zorder=zorder)
        if level:
            name, height = level
            axes.axhline(height, color=COLORS["ink"], linestyle="--", linewidth=1.2, label=name)
        _number(axes.xaxis)
        axes.set_xlabel("block")
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))

    return plot


def curves(
    series: Mapping[str, Points], xlabel: str = "block", title: str = "", percent: bool = False
) -> Plot:
    """Plot curves.

    Parameters
    ----------
    series : mapping of str to sequence of pairs
        Name and points of each curve.
    xlabel, title : str
        Text below and above the chart.
    percent : bool
        Whether y is a fraction to show as a percentage.
    """

    def plot(axes: Axes) -> None:
        for name, points in series.items():
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker="o" if len(x) <= 40 else "", label=name)
            if all(isinstance(value, int) for value in x):
                _number(axes.xaxis)
        axes.set(xlabel=xlabel, title=title)
        if percent:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1))

    return plot


def unit_map(kept: Sequence[Sequence[int]], total: Sequence[int]) -> Plot:
    """Plot a cell for each unit of each block: filled if kept, hollow if removed.

    Parameters
    ----------
    kept : sequence of sequence of int
        Indices of the units that each block keeps.
    total : sequence of int
        Number of units of each block before pruning.
    """
    units = [(block, unit) for block, count in enumerate(total) for unit in range(count)]

    def plot(axes: Axes) -> None:
        looks = (("kept", _SERIES[0], _SERIES[0]), ("removed", "none", COLORS["muted"]))
        for name, face, edge in looks:
            cells = [(b, u - 0.36) for b, u in units if (u in kept[b]) == (name == "kept")]
            if cells:
                blocks, tops = zip(*cells, strict=True)
                axes.bar(blocks, 0.72, 0.72, tops, label=name, facecolor=face, edgecolor=edge)
        axes.set(xlabel="block", ylim=(max(total) - 0.4, -0.6))
        _number(axes.xaxis)
        _number(axes.yaxis)
        axes.grid(visible=False)

    return plot


def grouped_bars(
    groups: Mapping[str, Sequence[tuple[float, float, float]]],
    targets: tuple[str, Sequence[float]] | None,
    places: Sequence[str],
    **labels: str,
) -> Plot:
    """Plot grouped bars with whiskers.

    Parameters
    ----------
    groups : mapping of str to sequence of three floats
        By name, one bar for each place: lower end of the whisker, height, upper end.
    targets : tuple of str and sequence of float, optional
        Name and heights of marks at the first bar of each place.
    places : sequence of str
        Labels of the places on the x axis.
    **labels
        ``title``, ``xlabel`` and ``ylabel``.
    """

    def plot(axes: Axes) -> None:
        for index, (name, spreads) in enumerate(groups.items()):
            low, height, high = np.transpose(spreads)
            centers = np.arange(len(places)) + 0.4 * (index - (len(groups) - 1) / 2)
            axes.bar(
                centers, height, 0.36, yerr=(height - low, high - height), capsize=3, label=name
            )
            if targets and index == 0:
                target, marks = targets
                ends = centers - 0.18, centers + 0.18
                axes.hlines(marks, *ends, COLORS["ink"], "dashed", label=target, zorder=3)
        axes.set_xticks(range(len(places)), places)
        axes.set(ylim=(0, 1.5 * axes.get_ylim()[1]), **labels)  # room for the legend

    return plot


def save(plots: Sequence[Plot], file: Path, title: str = "") -> None:
    """Write charts side by side to a file; the same data gives the same SVG.

    Parameters
    ----------
    plots : sequence of Plot
        The charts, left to right.
    file : Path
        File to write; its suffix determines the format.
    title : str
        Title of the whole figure.

    Raises
    ------
    RunStateError
        If the file cannot be written.
    """
    count, kind = max(1, len(plots)), file.suffix[1:]
    with style.context(["default", _STYLE | {"svg.hashsalt": "slimgpt"}]):
        figure = Figure(figsize=(5 * count, 4), layout="constrained")
        for axes, plot in zip(figure.subplots(1, count, squeeze=False)[0], plots, strict=False):
            if _draw(plot, axes):
                axes.legend()
        figure.suptitle(title)
        metadata = {"Date": None} if kind == "svg" else None
        with writing(file), replacing(file) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)


def inline(label: str, plot: Plot, height: int = 240) -> str:
    """Make a chart as an HTML element.

    Parameters
    ----------
    label : str
        Description of the chart for screen readers.
    plot : Plot
        The chart.
    height : int
        Height in CSS pixels.
    """
    drawings = []
    for kind, width in _WIDTHS.items():
        # The salt makes the ids of a drawing unique within the page, and reproducible.
        with style.context(["default", _STYLE | {"svg.hashsalt": f"{kind} {label}"}]):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            if names := _draw(plot, figure.subplots()):
                fits = sum(8 * len(name) + 40 for name in names) < width
                figure.legend(loc="outside upper left", ncols=len(names) if fits else 1)
            drawings.append(_inline_svg(figure, kind))
    return f'<div role="img" aria-label="{escape(label)}">{"".join(drawings)}</div>'


def _inline_svg(figure: Figure, kind: str) -> str:
    """SVG without the parts that only a separate file needs."""
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    svg = re.sub(r"<svg .*? viewBox", f'<svg class="{kind}" viewBox', svg, count=1, flags=re.S)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _draw(plot: Plot, axes: Axes) -> list[str]:
    """Draw a chart; return the names in its legend."""
    axes.margins(x=0.02)
    plot(axes)
    return axes.get_legend_handles_labels()[1]


def _number(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
