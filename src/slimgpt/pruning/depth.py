"""Choose the blocks to drop: one after the other, each by the KL divergence that it costs.

In each round, the model without each of the remaining blocks is compared with the dense model on
held-out calibration tokens. All these candidates go through the blocks together, in one pass with
one block in memory at a time.

Shape suffixes: ``N`` samples, ``T`` tokens of a sample, ``C`` hidden size, ``V`` vocabulary.
"""

import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.allocation.reallocation import PROBE_TOKENS, probe_samples
from slimgpt.calibration.activations import TOKENS_PER_BATCH, Stream, embed, pass_block
from slimgpt.checkpoint.depth import first_droppable
from slimgpt.errors import UnsupportedModelError
from slimgpt.models.blocks import Block, bind
from slimgpt.models.loading import build_skeleton
from slimgpt.models.streaming import StreamedModel
from slimgpt.pruning.job import Job
from slimgpt.pruning.memory import FLOAT32
from slimgpt.pruning.plan import config_without
from slimgpt.runtime.distributed import all_reduce, is_main, shard_batches
from slimgpt.runtime.run_directory import dropped_file

log = logging.getLogger(__name__)

MAX_TOKENS = 2048  # on which the candidates are compared

MODULE_INDICES = ("layer_idx", "layer_id")  # attributes with the place of a block


def choose_layers(job: Job) -> tuple[int, ...]:
    """Choose the blocks to drop, greedily; each choice is saved in the run directory.

    Parameters
    ----------
    job : Job
        The dense model, the samples and the run directory.

    Returns
    -------
    tuple of int
        Indices of the dropped blocks, sorted.

    Raises
    ------
    UnsupportedModelError
        If a layer would become another kind of layer in its new place.
    """
    dropped: list[int] = []
    samples_NT = job.probes
    samples_NT = samples_NT[: max(1, MAX_TOKENS // samples_NT.shape[1])]
    for number in range(job.config.drop_layers):
        name = dropped_file(number)
        if not job.run.all_have(name):
            choices = range(first_droppable(job.base_config), len(job.shapes))
            candidates = [index for index in choices if index not in dropped]
            losses = divergences(job.streamed, samples_NT, dropped, candidates)
            best = min(candidates, key=losses.__getitem__)
            job.run.write(name, json.dumps({"layer": best, "divergences": losses}))
        saved = json.loads(job.run.read(name))
        dropped.append(saved["layer"])
        loss = saved["divergences"][str(dropped[-1])]
        log.info("layer %d is dropped: KL divergence %.4f without compensation", dropped[-1], loss)
        if is_main():
            job.progress("depth", number + 1, job.config.drop_layers)
    check_same_layers(job.base_config, dropped)
    return tuple(sorted(dropped))


@torch.no_grad()
def divergences(
    streamed: StreamedModel,
    samples_NT: Tensor,
    dropped: Collection[int],
    candidates: Collection[int],
) -> dict[int, float]:
    """KL(dense ‖ model without the dropped blocks and one candidate), in nats per token.

    The processes share out the candidates; all run on the same samples, so the result does not
    depend on their number.

    Parameters
    ----------
    streamed : StreamedModel
        The dense model.
    samples_NT : Tensor
        int64, the tokens on which the models are compared.
    dropped : collection of int
        Blocks that are dropped already.
    candidates : collection of int
        Others, of which one more may be dropped.
    """
    listed = sorted(candidates)
    # The first candidates take longest, so each process gets some from both ends.
    folded = [index for pair in zip(listed, reversed(listed), strict=True) for index in pair]
    own = sorted(folded[place] for place in shard_batches(len(listed)))
    batch_size = max(1, TOKENS_PER_BATCH // samples_NT.shape[1])
    with streamed.around_blocks() as model:
        stream = embed(model, samples_NT, batch_size, with_dense=True)
    dense, without = stream.dense(), {}
    assert dense is not None
    stream = replace(stream, dense_NTC=None, dense_input_NTC=None)
    for block in streamed.blocks():
        pass_block(block, dense)
        if block.index in dropped:
            continue
        for other in without.values():
            pass_block(block, other)
        if block.index in own:
            without[block.index] = replace(stream, hidden_NTC=stream.hidden_NTC.clone())
        if len(without) < len(own):
            pass_block(block, stream)
    losses = torch.zeros(len(listed), dtype=torch.float64)
    for index, loss in zip(own, _losses(streamed, dense, list(without.values())), strict=True):
        losses[listed.index(index)] = loss
    return dict(zip(listed, all_reduce(losses).tolist(), strict=True))


def _losses(streamed: StreamedModel, dense: Stream, others: list[Stream]) -> list[float]:
    """KL divergence of each stream after the last block, per token."""
    losses = [0.0] * len(others)
    with streamed.after_blocks() as head:
        for sample, dense_TC in enumerate(dense.hidden_NTC):  # one at a time: logits are large
            dense_TV = log_softmax(head(dense_TC).float(), dim=-1)
            for index, other in enumerate(others):
                other_TV = log_softmax(head(other.hidden_NTC[sample]).float(), dim=-1)
                loss = kl_div(other_TV, dense_TV, reduction="sum", log_target=True)
                losses[index] += float(loss)
    return [loss / dense.hidden_NTC.shape[:2].numel() for loss in losses]


def choice_bytes(skeleton: PreTrainedModel, nsamples: int, seqlen: int) -> int:
    """Bytes for the choice: the stream without each block, embedding, head and logits."""
    config, num_tokens = skeleton.config.get_text_config(), min(seqlen, PROBE_TOKENS)
    num_samples = min(len(probe_samples(nsamples)), max(1, MAX_TOKENS // num_tokens))
    states = (config.num_hidden_layers + 3) * num_samples * num_tokens
    numbers = (states + 2 * config.vocab_size) * config.hidden_size
    return numbers * skeleton.dtype.itemsize + 6 * num_tokens * config.vocab_size * FLOAT32


def check_same_layers(base_config: PreTrainedConfig, dropped: Collection[int]) -> None:
    """Check that each layer is of the same kind after others are dropped.

    Raises
    ------
    UnsupportedModelError
        If a layer would have other modules, shapes or settings in its new place.
    """
    if not dropped:
        return
    small = build_skeleton(config_without(base_config, dropped))
    kept = [block for block in bind(build_skeleton(base_config)) if block.index not in dropped]
    for before, after in zip(kept, bind(small), strict=True):
        was, now = dict(_settings(before)), dict(_settings(after))
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                raise UnsupportedModelError(
                    f"without the layers {', '.join(map(str, sorted(dropped)))}, layer "
                    f"{before.index} would be of another kind in its new place: {key} is "
                    f"{was.get(key)} and would be {now.get(key)}",
                    hint="leave out --drop-layers: the config of this model cannot say which kind "
                    "each layer is",
                )


def _settings(block: Block) -> Iterator[tuple[str, object]]:
    """What distinguishes kinds of blocks: modules, shapes, and settings other than the place."""
    yield "sublayers", [sublayer.spec for sublayer in block.sublayers]
    for name, tensor in block.module.state_dict().items():
        yield name, tuple(tensor.shape)
    for name, module in block.module.named_modules():
        yield f"{name} (module)", type(module).__name__
        for key, value in vars(module).items():
            if (
                value is None or isinstance(value, int | float | str)
            ) and key not in MODULE_INDICES:
                yield f"{name}.{key}", value
