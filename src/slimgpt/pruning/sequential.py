"""The sequential pass: prune the blocks first to last, each on the outputs of the pruned ones."""

import json
import logging
import time
from collections.abc import Iterator, Sequence

from slimgpt.allocation.shapes import BlockWidths, is_dropped
from slimgpt.calibration.activations import embed
from slimgpt.models.blocks import Block
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weights import write_file
from slimgpt.pruning.block import Gap, prune_block, replay_block
from slimgpt.pruning.decisions import BlockPlan, SavedBlock
from slimgpt.pruning.job import Job
from slimgpt.runtime.distributed import is_main, shard
from slimgpt.runtime.environment import peak_memory
from slimgpt.runtime.files import writing
from slimgpt.runtime.run_directory import Run, Stage

log = logging.getLogger(__name__)


def sequential_pass(job: Job, widths: Sequence[BlockWidths], stage: Stage = "block") -> None:
    """Prune and save the blocks; re-apply the decisions of blocks that are already saved.

    Dropped blocks only move the dense model's stream, if there is one.

    Parameters
    ----------
    job : Job
        The dense model, the samples and the run directory.
    widths : sequence of tuple of int
        Units that each block keeps, by sublayer.
    stage : {"block", "sensitivity"}
        Prefix of the saved blocks' file names.
    """
    run, memory = job.run, job.memory
    samples_NT = shard(job.samples_NT, job.batch_size)
    place = run.state if memory.is_mapped else None
    if memory.activations.on_gpu:
        place = job.streamed.device
    with writing(run.output), job.streamed.around_blocks() as model:
        stream = embed(model, samples_NT, job.batch_size, job.method.needs_dense, place)
    log.info("calibrating on %d samples of %d tokens", *samples_NT.shape)
    kept = kept_indices(widths)
    begun, num_blocks = time.monotonic(), len(kept)
    for done, (block, gap) in enumerate(kept_blocks(job.streamed, kept), start=1):
        start, name = time.monotonic(), run.block_file(block.index, stage)
        if run.all_have(name):
            saved = SavedBlock.open(run.saved(name))
            replay_block(block, saved, stream)
            plan = saved.plan
            if gap:
                gap.move_dense(stream)
        else:
            kept_bytes = memory.activations.kept
            plan = prune_block(block, widths[block.index], stream, job.method, kept_bytes, gap)
            if is_main():
                _save_block(run, name, block, plan, time.monotonic() - start)
        left = (time.monotonic() - begun) / done * (num_blocks - done)
        log.info("%s %d/%d: %s; %.0f s left", stage, done, num_blocks, plan, left)
        if is_main():
            job.progress(stage, done, num_blocks)


def kept_indices(widths: Sequence[BlockWidths]) -> list[int]:
    """Indices of the blocks that are not dropped; the first block is always among them."""
    return [index for index, width in enumerate(widths) if not is_dropped(width)]


def kept_blocks(streamed: StreamedModel, kept: Sequence[int]) -> Iterator[tuple[Block, Gap | None]]:
    """Yield each block that is not dropped, with its weights, and the gap after it, if any."""
    following = [*kept[1:], streamed.skeleton.config.get_text_config().num_hidden_layers]
    for block, end in zip(streamed.blocks(kept), following, strict=True):
        dropped = range(block.index + 1, end)
        yield block, Gap(dropped, streamed) if dropped else None


def _save_block(run: Run, name: str, block: Block, plan: BlockPlan, seconds: float) -> None:
    state = block.module.state_dict()
    tensors = {f"{block.name}.{key}": tensor for key, tensor in state.items()}
    cost = {"seconds": seconds, "peak_memory_bytes": peak_memory()}
    metadata = {"plan": json.dumps(plan.to_json()), "cost": json.dumps(cost)}
    with run.saving(name) as temporary:
        write_file(temporary, tensors, metadata)
