"""One sweep over the blocks of a model: each is pruned and saved, or replayed if it was before."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.calibration.activations import choose_batch_size, embed
from slimgpt.config import PruneConfig
from slimgpt.models.family import Block
from slimgpt.models.stored import read_tensor
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weights import read_metadata, write_file
from slimgpt.pruning.block import prune_block, replay_block
from slimgpt.pruning.decisions import BlockPlan
from slimgpt.pruning.memory import Footprint
from slimgpt.runtime.distributed import from_main, is_main, own_part
from slimgpt.runtime.environment import peak_memory
from slimgpt.runtime.files import reading, writing
from slimgpt.runtime.progress import Progress, no_progress
from slimgpt.runtime.run_directory import Run, Stage

log = logging.getLogger(__name__)


def sweep(
    streamed: StreamedModel,
    samples_NT: Tensor,
    widths: Sequence[BlockWidths],
    config: PruneConfig,
    footprint: Footprint,
    run: Run,
    scores: Sequence[Tensor] = (),
    stage: Stage = "block",
    progress: Progress = no_progress,
) -> None:
    """Prune every block; replay those that an earlier run has finished.

    Parameters
    ----------
    streamed : StreamedModel
        The model as it was before.
    samples_NT : Tensor
        int64, the calibration tokens of all processes.
    widths : sequence of BlockWidths
        What the blocks keep.
    config, scores
        See `slimgpt.pruning.block.prune_block`.
    footprint : Footprint
        Where the residual stream is, and how many activations are kept.
    run : Run
        Where the blocks are saved.
    stage : {"block", "survey"}
        What the sweep is for.
    progress : Progress
        Called with the stage after each block, in the main process.
    """
    batch_size = choose_batch_size(*samples_NT.shape)
    samples_NT = own_part(samples_NT, batch_size)
    directory = run.state if footprint.is_mapped else None
    with writing(run.output), streamed.around_blocks() as model:
        stream = embed(model, samples_NT, batch_size, config.needs_dense, directory)
    log.info("calibrating on %d samples of %d tokens", *samples_NT.shape)
    begun, num_blocks = time.monotonic(), len(widths)
    for block, width in zip(streamed.blocks(), widths, strict=True):
        start, name = time.monotonic(), run.block_file(block.index, stage)
        if from_main(run.has(name)):
            file = run.saved(name)
            plan = read_plan(file)
            replay_block(block, plan, partial(read_tensor, file), stream)
        else:
            plan = prune_block(
                block, width, stream, footprint.kept, config, scores, stage == "survey"
            )
            if is_main():
                _save_block(run, name, block, plan, time.monotonic() - start)
        done = block.index + 1
        left = (time.monotonic() - begun) / done * (num_blocks - done)
        log.info("%s %d/%d: %s; %.0f s left", stage, done, num_blocks, plan, left)
        if is_main():
            progress(stage, done, num_blocks)


def read_plan(file: Path) -> BlockPlan:
    """What was decided for the block in a file that a sweep has saved."""
    with reading(file):
        return BlockPlan.from_json(json.loads(read_metadata(file)["plan"]))


def _save_block(run: Run, name: str, block: Block, plan: BlockPlan, seconds: float) -> None:
    state = block.module.state_dict()
    tensors = {f"{block.name}.{key}": tensor for key, tensor in state.items()}
    cost = {"seconds": seconds, "peak_memory_bytes": peak_memory()}
    given = asdict(plan, dict_factory=lambda items: {k: v for k, v in items if v != ()})
    metadata = {"plan": json.dumps(given), "cost": json.dumps(cost)}
    with run.saving(name) as temporary:
        write_file(temporary, tensors, metadata)
