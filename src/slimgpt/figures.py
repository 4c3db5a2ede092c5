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
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlecolor": _MUTED,
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
    "legend.frameon": False,
    "legend.borderpad": 0,
}


def bars(
    label: str,
    title: str,
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
    title : str
        Of the vertical axis.
    values : mapping of str to sequence of float
        Name and heights of bars that stand before each other: the first in front, in colour.
    level : tuple of str and float, optional
        Name and height of a line across.
    percent : bool
        Whether the heights are fractions to show as percentages.
    """

    def plot(axes: Axes) -> None:
        colors = (_SERIES[0], _FAINT)
        for depth, ((name, heights), color) in enumerate(zip(values.items(), colors, strict=False)):
            axes.bar(
                range(len(heights)), heights, 0.78, color=color, label=name, zorder=2 - depth / 2
            )
        if level:
            axes.axhline(level[1], color=_INK, linestyle="--", linewidth=1.2, label=level[0])
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("block")

    return _figure(label, title, plot)


def lines(
    label: str,
    title: str,
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
    title : str
        Of the vertical axis.
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
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel)

    return _figure(label, title, plot)


def unit_map(label: str, title: str, kept: Sequence[Sequence[int]], total: Sequence[int]) -> Markup:
    """Draw a square for each unit of each block: filled if it is kept, hollow if not.

    Parameters
    ----------
    label : str
        What the chart shows, for those who cannot see it.
    title : str
        Of the vertical axis.
    kept : sequence of sequence of int
        Indices of the units that each block keeps.
    total : sequence of int
        How many units each block had.
    """
    cells = {True: [], False: []}
    for block, (units, num_units) in enumerate(zip(kept, total, strict=True)):
        for unit in range(num_units):
            cells[unit in units].append((block, unit))

    def plot(axes: Axes) -> None:
        kinds = (
            (True, "kept", {"facecolor": _SERIES[0], "edgecolor": _SERIES[0]}),
            (False, "removed", {"facecolor": "none", "edgecolor": _MUTED}),
        )
        for is_kept, name, colors in kinds:
            if cells[is_kept]:
                blocks, units = zip(*cells[is_kept], strict=True)
                bottoms = [unit - 0.36 for unit in units]
                axes.bar(blocks, 0.72, 0.72, bottoms, label=name, linewidth=0.8, **colors)
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set_xlabel("block")

    return _figure(label, title, plot, height=min(100 + 20 * max(total), 520))


def _figure(label: str, title: str, plot: Callable[[Axes], None], height: int = _HEIGHT) -> Markup:
    drawings = []
    for name, width in _WIDTHS.items():
        # The salt makes the ids that a drawing refers to its own, and the same each time.
        with style.context(["default", _STYLE | {"svg.hashsalt": f"{name} {label}"}]):
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            axes = figure.subplots()
            plot(axes)
            axes.set_title(title)
            axes.margins(x=0.02)
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=axis is axes.xaxis)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                figure.legend(loc="outside upper left", ncols=3)
            drawings.append(_inline(figure, name))
    return Markup('<div role="img" aria-label="{}">{}</div>').format(
        label, Markup("".join(drawings))
    )


def _inline(figure: Figure, name: str) -> str:
    """SVG without what only a file of its own needs."""
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    svg = re.sub(r"<svg .*? viewBox", f'<svg class="{name}" viewBox', svg, count=1, flags=re.S)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
