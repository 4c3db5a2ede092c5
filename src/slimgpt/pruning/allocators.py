"""Allocators choose the widths of every block. An allocator is a function from a job to widths."""

from collections.abc import Callable

from slimgpt.allocation.reallocation import nested_widths
from slimgpt.allocation.shapes import BlockWidths
from slimgpt.pruning.job import Job
from slimgpt.pruning.plan import initial_widths, is_measured, width_rules
from slimgpt.pruning.search import searched_widths
from slimgpt.pruning.sensitivity import measured_widths


def scheduled_widths(job: Job) -> list[BlockWidths]:
    """Compute the widths from the target, the given layer ratios or the schedule."""
    return initial_widths(job.shapes, job.base_config, job.config, job.target, job.dropped)


Allocator = Callable[[Job], list[BlockWidths]]
ALLOCATORS: dict[str, Allocator] = {
    "scheduled": scheduled_widths,
    "measured": measured_widths,
    "searched": searched_widths,
}


def allocate(job: Job) -> list[BlockWidths]:
    """Choose the widths of every block with the allocator that the options name.

    Measured and searched widths fall back to the schedule if nothing is removed or there are too
    few samples.
    """
    scheduled = scheduled_widths(job)
    name = job.config.widths
    if name != "scheduled" and not is_measured(job.shapes, scheduled, job.seqlen, job.config):
        name = "scheduled"
    widths = ALLOCATORS[name](job)
    if within := job.method.within:
        limits = [
            tuple(len(within[index, sublayer.kind]) for sublayer in shape.sublayers)
            for index, shape in enumerate(job.shapes)
        ]
        rules = width_rules(job.base_config, job.config)
        widths = nested_widths(job.shapes, widths, limits, rules)
    job.stopwatch.lap("sensitivity")
    return widths
