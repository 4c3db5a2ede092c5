"""Charts as inline SVG that takes its colours from the page, in two widths.

The page shows ``.wide`` or ``.narrow``, whichever fits, so that text has the same size on a desktop
and on a phone. One point of Matplotlib is one CSS pixel there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO

from cycler import cycler
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_WIDTHS = {"wide": 720, "narrow": 340}

_HEIGHT = 240

# Stand-ins for the variables of the page's style sheet.
_INK, _MUTED, _LINE, _FAINT = "#010101", "#020202", "#030303", "#040404"

_SERIES = ("#050505", "#060606", "#070707")

_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _LINE: "line",
    _FAINT: "faint",
    **{color: f"series-{number}" for number, color in enumerate(_SERIES, 1)},
}

_STYLE = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
    "font.size": 12,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=_SERIES),
    "grid.color": _LINE,
    "lines.linewidth": 2,
    "lines.markersize": 4,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _INK,
    "patch.linewidth": 0.8,
    "figure.constrained_layout.h_pad": 0.1,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.handlelength": 1.5,
}


def bars(
    label: str,
    values: Mapping[str, Sequence[float]],
    level: tuple[str, float] | None = None,
    *,
    percent: bool = False,
) -> Markup:
    """Draw a bar for each block.

    Parameters
    ----------
    label : str
        What the chart shows, for those who cannot see it.
    values : mapping of str to sequence of float
        Name and heights of bars that stand before each other: the first in front, in colour.
    level : tuple of str and float, optional
        Name and height of a line across.
    percent : bool
        Whether the heights are fractions to show as percentages.
    """

    def plot(axes: Axes) -> None:
        looks = ((_SERIES[0], 2), (_FAINT, 1))
        for (name, heights), (color, zorder) in zip(values.items(), looks, strict=False):
            axes.bar(range(len(heights)), heights, 0.78, color=color, label=name, zorder=zorder)
        if level:
            axes.axhline(level[1], color=_INK, linestyle="--", linewidth=1.2, label=level[0])

    return _figure(label, plot, percent=percent)


def lines(
    label: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str = "block",
    *,
    percent: bool = False,
) -> Markup:
    """Draw curves.

    Parameters
    ----------
    label : str
        What the chart shows, for those who cannot see it.
    series : mapping of str to two sequences of float
        Name and points of each curve: x and y.
    xlabel : str
        Of the horizontal axis.
    percent : bool
        Whether y is a fraction to show as a percentage.
    """

    def plot(axes: Axes) -> None:
        for name, (x, y) in series.items():
            axes.plot(x, y, marker="o" if len(x) <= 40 else "", label=name)
        if percent:
            axes.set_ylim(bottom=0)

    return _figure(label, plot, xlabel, percent=percent)


def unit_map(label: str, kept: Sequence[Sequence[int]], total: Sequence[int]) -> Markup:
    """Draw a cell for each unit of each block: filled if it is kept, hollow if not.

    Parameters
    ----------
    label : str
        What the chart shows, for those who cannot see it.
    kept : sequence of sequence of int
        Indices of the units that each block keeps.
    total : sequence of int
        How many units each block had.
    """
    cells: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for block, (units, num_units) in enumerate(zip(kept, total, strict=True)):
        for unit in range(num_units):
            cells[unit in units].append((block, unit))

    def plot(axes: Axes) -> None:
        for is_kept, name, face, edge in (
            (True, "kept", _SERIES[0], _SERIES[0]),
            (False, "removed", "none", _MUTED),
        ):
            if cells[is_kept]:
                blocks, units = zip(*cells[is_kept], strict=True)
                tops = [unit - 0.36 for unit in units]
                axes.bar(blocks, 0.72, 0.72, tops, label=name, facecolor=face, edgecolor=edge)
        axes.set_ylim(max(total) - 0.4, -0.6)
        axes.yaxis.set_major_locator(_whole_numbers())
        axes.grid(visible=False)

    return _figure(label, plot, height=min(80 + 24 * max(total), 560))


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)


def _figure(
    label: str,
    plot: Callable[[Axes], None],
    xlabel: str = "block",
    *,
    percent: bool = False,
    height: int = _HEIGHT,
) -> Markup:
    drawings = []
    for kind, width in _WIDTHS.items():
        # The salt makes the ids that a drawing refers to its own, and the same each time.
        with style.context(["default", _STYLE | {"svg.hashsalt": f"{kind} {label}"}]):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            axes = figure.subplots()
            plot(axes)
            axes.set_xlabel(xlabel)
            if percent:
                axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.margins(x=0.02)
            axes.xaxis.set_major_locator(_whole_numbers())
            if labels := axes.get_legend_handles_labels()[1]:
                fits = sum(8 * len(name) + 40 for name in labels) < width
                figure.legend(loc="outside upper left", ncols=len(labels) if fits else 1)
            drawings.append(_inline(figure, kind))
    return Markup('<div role="img" aria-label="{}">{}</div>').format(
        label, Markup("".join(drawings))
    )


def _inline(figure: Figure, kind: str) -> str:
    """SVG without what only a file of its own needs."""
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    svg = re.sub(r"<svg .*? viewBox", f'<svg class="{kind}" viewBox', svg, count=1, flags=re.S)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
