"""How far a long call has come: a callback of the user, and a bar for terminals that is one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

Progress = Callable[[str, int, int], None]
"""Called with what is counted (``"block"``, ``"step"``, …), how many are done, and of how many.

Only the main process calls it, after each block or step. What it raises ends the call that it was
given to, as Ctrl-C does.
"""

LONGEST_STEP = 24 * 3600.0  # seconds; the speed is a mean over the steps of that time


def no_progress(phase: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Show a bar with the remaining time for what is under way; nothing without a terminal.

    Parameters
    ----------
    console : rich.console.Console
        Where the bar is. What else is printed there stays above it.

    Yields
    ------
    Progress
        For the argument ``progress`` of `slimgpt.prune` and `slimgpt.recover`.

    Examples
    --------
    >>> import slimgpt
    >>> from rich.console import Console
    >>> with progress_bar(Console(stderr=True)) as progress:  # doctest: +SKIP
    ...     slimgpt.prune("smollm2-135m", "slim", ratio=0.2, progress=progress)
    """
    if not (console.is_interactive and console.file.isatty()):
        yield no_progress
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        auto_refresh=False,  # no thread
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        speed_estimate_period=LONGEST_STEP,
    )
    tasks: dict[str, TaskID] = {}

    def show(phase: str, done: int, total: int) -> None:
        with suppress(OSError):  # the terminal is gone; the work goes on
            bar.start()
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, visible=done < total, refresh=True)

    try:
        yield show
    finally:
        with suppress(OSError):
            bar.stop()
