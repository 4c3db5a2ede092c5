"""Show results in a notebook: tables and, if Matplotlib is installed, charts."""

from collections.abc import Iterable
from html import escape
from importlib.util import find_spec
from typing import Any

from slimgpt.presentation.tables import Table

# A notebook has a light or a dark theme of its own, so text and lines take the colour around them.
_STYLE = """<style>
.slimgpt {
  --ink: currentColor; --muted: currentColor; --line: #8886; --faint: #8885;
  --series-1: #4a8ae8; --series-2: #d97a2b; --series-3: #3f9d68; max-width: 47rem;
}
.slimgpt :is(th, td) { text-align: left; }
.slimgpt svg { display: block; width: 100%; height: auto; }
.slimgpt svg.narrow { display: none; }
.slimgpt .scroll { max-height: 24rem; overflow: auto; }
@media (max-width: 36rem) {
  .slimgpt svg.wide { display: none; }
  .slimgpt svg.narrow { display: block; }
}
</style>"""


def page(*parts: str) -> str:
    """Join parts to what a notebook shows for one value."""
    return f'{_STYLE}<div class="slimgpt">{"".join(parts)}</div>'


def rows(cells: Iterable[Iterable[str]]) -> str:
    """Make a table without a header; the first cell of each row names it."""
    lines = (f"<tr><th>{escape(name)}</th>{_cells('td', values)}</tr>" for name, *values in cells)
    return f"<table>{''.join(lines)}</table>"


def table(title: str, data: Table) -> str:
    """Make a table that opens when its title is clicked."""
    header = _cells("th", data.columns)
    lines = (f"<tr>{_cells('td', (row[c] for c in data.columns))}</tr>" for row in data.rows)
    return (
        f'<details><summary>{escape(title)}</summary><div class="scroll"><table>'
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def chart(title: str, kind: str, *values: Any, **options: Any) -> str:
    """Draw a chart.

    Parameters
    ----------
    title : str
        What it shows.
    kind : str
        Name of a function of `slimgpt.presentation.figures` that makes a plot.
    *values, **options
        Arguments of that function.

    Returns
    -------
    str
        HTML; empty if Matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return ""
    from slimgpt.presentation import figures

    plot = getattr(figures, kind)(*values, **options)
    return f"<p><b>{escape(title)}</b></p>{figures.inline(title, plot)}"


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
