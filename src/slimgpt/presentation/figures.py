"""Charts of one style, in files or inline in a page.

An inline chart is SVG that takes its colours from the page, in two widths. The page shows ``.wide``
or ``.narrow``, whichever fits, so that text has the same size on a desktop and on a phone. One
point of Matplotlib is one CSS pixel there.
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

# By the name of their variable in the page's style sheet.
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
        Name and heights of bars that stand before each other: the first in front, in colour.
    level : tuple of str and float, optional
        Name and height of a line across.
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
    """Plot a cell for each unit of each block: filled if it is kept, hollow if not.

    Parameters
    ----------
    kept : sequence of sequence of int
        Indices of the units that each block keeps.
    total : sequence of int
        How many units each block had.
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
    """Plot bars beside each other, with whiskers.

    Parameters
    ----------
    groups : mapping of str to sequence of three floats
        Name of a bar, and in each place the lower end of its whisker, its height, the upper end.
    targets : tuple of str and sequence of float, optional
        Name and heights of marks over the first bar of each place.
    places : sequence of str
        Names of the places.
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
    """Write charts beside each other into a file; the same data gives the same SVG.

    Parameters
    ----------
    plots : sequence of Plot
        The charts, left to right.
    file : Path
        Its suffix is the format.
    title : str
        Of the whole figure.

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
    """Write a chart as an element of a page.

    Parameters
    ----------
    label : str
        What the chart shows, for those who cannot see it.
    plot : Plot
        The chart.
    height : int
        In CSS pixels.
    """
    drawings = []
    for kind, width in _WIDTHS.items():
        # The salt makes the ids that a drawing refers to its own, and the same each time.
        with style.context(["default", _STYLE | {"svg.hashsalt": f"{kind} {label}"}]):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            if names := _draw(plot, figure.subplots()):
                fits = sum(8 * len(name) + 40 for name in names) < width
                figure.legend(loc="outside upper left", ncols=len(names) if fits else 1)
            drawings.append(_inline_svg(figure, kind))
    return f'<div role="img" aria-label="{escape(label)}">{"".join(drawings)}</div>'


def _inline_svg(figure: Figure, kind: str) -> str:
    """SVG without what only a file of its own needs."""
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
