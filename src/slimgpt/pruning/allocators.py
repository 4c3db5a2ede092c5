"""Ways to find the widths of every block; a new one is a function from a job to widths."""

from collections.abc import Callable

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.pruning.job import Job
from slimgpt.pruning.plan import initial_widths, is_measured
from slimgpt.pruning.sensitivity import measured_widths


def scheduled_widths(job: Job) -> list[BlockWidths]:
    """Widths as the ratios say, given or scheduled."""
    return initial_widths(job.base_config, job.config)


Allocator = Callable[[Job], list[BlockWidths]]
ALLOCATORS: dict[str, Allocator] = {"scheduled": scheduled_widths, "measured": measured_widths}


def allocate(job: Job) -> list[BlockWidths]:
    """Find the widths of every block in the way that the options name.

    Where there is nothing to measure, or too few samples, they stay as scheduled.
    """
    scheduled = scheduled_widths(job)
    name = job.config.widths
    if name == "measured" and not is_measured(job.base_config, job.config, scheduled):
        name = "scheduled"
    widths = ALLOCATORS[name](job)
    job.stopwatch.lap("sensitivity")
    return widths
