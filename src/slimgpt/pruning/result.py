"""Assemble the pruned model and its report."""

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths, removed_params
from slimgpt.checkpoint.card import write_card
from slimgpt.checkpoint.results import REPORT_FILE
from slimgpt.checkpoint.tokenizer import write_tokenizer
from slimgpt.checkpoint.writer import add_older_keys, pruned_config, write_shards
from slimgpt.config import PruneConfig
from slimgpt.data.datasets import SELF, describe_dataset
from slimgpt.models.device import fast_dtype
from slimgpt.models.layout import decoder_name, family_in
from slimgpt.models.stored import read_tensor
from slimgpt.models.weights import read_metadata, saved_tensors, tensor_names
from slimgpt.pruning.decisions import dropped_block
from slimgpt.pruning.experts import TOKENS_PER_CHANNEL
from slimgpt.pruning.job import Job
from slimgpt.pruning.plan import is_uniform, make_plan
from slimgpt.pruning.sequential import kept_indices
from slimgpt.runtime.distributed import is_main
from slimgpt.runtime.environment import versions
from slimgpt.runtime.run_directory import MEASUREMENT_FILE, TRIALS_FILE

log = logging.getLogger(__name__)


def write_result(job: Job, widths: Sequence[BlockWidths]) -> None:
    """Write the pruned model from the finished blocks and the unchanged tensors.

    Only the main process writes.
    """
    if not is_main():
        return
    run, streamed, config = job.run, job.streamed, job.config
    log.info("saving to %s", run.output)
    kept = kept_indices(widths)
    files = [run.saved(run.block_file(index)) for index in kept]
    report = _report(job, widths, [read_metadata(file) for file in files])
    _warn_of_few_tokens(job, report["blocks"])
    finished = {name: file for file in files for name in tensor_names(file)}

    def read(name: str) -> Tensor:
        file = finished.get(name)
        return read_tensor(file, name) if file else streamed.weights.read(name)

    uniform = is_uniform(job.base_config, config, job.shapes, widths)
    small_config = pruned_config(streamed.skeleton.config, widths, uniform)
    small_config.dtype = streamed.weights.dtype
    with run.result() as directory:
        small_config.save_pretrained(directory)
        add_older_keys(directory)
        job.generation_config.save_pretrained(directory)
        write_tokenizer(streamed.weights.source, job.tokenizer, directory)
        state = saved_tensors(streamed.skeleton)
        places = _places(streamed.skeleton, kept)

        @lru_cache(maxsize=1)
        def stored(name: str, with_values: bool) -> dict[str, Tensor]:
            tensor = read(name) if with_values else state[name].to("meta")
            # The result's own class reads the names of the model.
            found = {name: tensor}
            if uniform:
                found = streamed.weights.as_in_file(name, tensor, streamed.skeleton)
            return {places.renamed(name, part): value for part, value in found.items()}

        parts = {part: name for name in state if places.keeps(name) for part in stored(name, False)}
        tensors = {part: stored(name, False)[part] for part, name in parts.items()}
        write_shards(directory, tensors, lambda n: stored(parts[n], True)[n], config.max_shard_size)
        job.stopwatch.lap("save")
        if config.target_size is not None and config.target_type == "auto":
            files = directory.glob("*.safetensors")
            report["target"]["reached"] = sum(file.stat().st_size for file in files)
        report["seconds"] = job.stopwatch.seconds | report["seconds"]
        (directory / REPORT_FILE).write_text(json.dumps(report) + "\n", encoding="utf-8")
        write_card(directory)


@dataclass(frozen=True)
class _Places:
    """Where the blocks of a model are in the result.

    Attributes
    ----------
    prefix, path : str
        Start of the names of their tensors in the model; path of their list in the decoder.
    numbers : dict of int to int
        The new index of each kept block.
    """

    prefix: str
    path: str
    numbers: dict[int, int]

    def keeps(self, name: str) -> bool:
        """Whether a tensor of the model is in the result."""
        return (index := self._index(name)) is None or index in self.numbers

    def renamed(self, name: str, part: str) -> str:
        """Name of a tensor in the result, from that in the model and that in the base's files."""
        index = self._index(name)
        if index is None:
            return part
        pattern = rf"(^|\.){re.escape(self.path)}\.{index}\."
        return re.sub(pattern, rf"\1{self.path}.{self.numbers[index]}.", part, count=1)

    def _index(self, name: str) -> int | None:
        """Index of the block that a tensor of the model belongs to."""
        if not name.startswith(self.prefix):
            return None
        return int(name.removeprefix(self.prefix).partition(".")[0])


def _places(model: PreTrainedModel, kept: Sequence[int]) -> _Places:
    path = family_in(model.config).blocks
    numbers = {index: place for place, index in enumerate(kept)}
    return _Places(f"{decoder_name(model)}.{path}.", path, numbers)


def _warn_of_few_tokens(job: Job, blocks: Sequence[dict[str, Any]]) -> None:
    """Warn of experts with few calibration tokens."""
    sublayers = (sublayer for block in blocks for sublayer in block["sublayers"])
    found = [
        routing for s in sublayers if (routing := s.get("routing")) and "few_tokens" in routing
    ]
    if found:
        log.warning(
            "experts with fewer than %d calibration tokens for each of their channels: %d; layers "
            "with such experts: %d; about %d samples would be enough for all that have any (%s "
            "lists them)",
            TOKENS_PER_CHANNEL,
            sum(len(routing["few_tokens"]) for routing in found),
            len(found),
            math.ceil(job.config.nsamples * max(routing["samples_factor"] for routing in found)),
            REPORT_FILE,
        )


def _what_was_measured(job: Job) -> dict[str, Any]:
    """Results of the sensitivity pass and of the search, if there were any."""
    run, found = job.run, {}
    if job.shared.has(MEASUREMENT_FILE):
        values = json.loads(job.shared.saved(MEASUREMENT_FILE).read_text(encoding="utf-8"))
        shapes, widths = job.shapes, [tuple(block) for block in values["widths"]]
        found["sensitivity"] = {
            "widths": widths,
            "layer_ratios": [
                removed_params(*p) / p[0].params for p in zip(shapes, widths, strict=True)
            ],
            "divergence": values["divergence"],
            "costs": values["costs"],
        }
    if run.has(TRIALS_FILE):
        trials = json.loads(run.saved(TRIALS_FILE).read_text(encoding="utf-8"))
        found["trials"] = [trial["divergence"] for trial in trials]
    return found


def reported_options(config: PruneConfig) -> dict[str, Any]:
    """Options as JSON values. They go to the hub with the model, so they hold no local paths."""
    options = config.model_dump(mode="json")
    for name in ("latency_table", "prompts"):
        options[name] = options[name] and Path(options[name]).name
    return options | {"calibration": [Path(name).name for name in config.calibration]}


def _described(name: str, config: PruneConfig) -> str:
    if name == SELF and config.prompts:
        return f"answers to {describe_dataset(config.prompts, 'calibration')}"
    return describe_dataset(name, "calibration")


def _report(
    job: Job, widths: Sequence[BlockWidths], metadata: Sequence[dict[str, str]]
) -> dict[str, Any]:
    config, streamed = job.config, job.streamed
    costs = [json.loads(block["cost"]) for block in metadata]
    plans = {plan["block"]: plan for plan in (json.loads(block["plan"]) for block in metadata)}
    blocks = [
        plans.get(index) or dropped_block(index, shape).to_json()
        for index, shape in enumerate(job.shapes)
    ]
    return {
        "base_model": streamed.weights.source.title,
        "config": reported_options(config),
        "dtype": str(streamed.weights.dtype).removeprefix("torch."),
        "products": str(fast_dtype(streamed.device, streamed.weights.dtype)).removeprefix("torch."),
        "device": str(streamed.device),
        "calibration": {
            "data": " + ".join(_described(name, config) for name in config.calibration),
            "nsamples": config.nsamples,
            "seqlen": job.seqlen,
        },
        **asdict(make_plan(job.base_config, config, widths, job.target)),
        "blocks": blocks,
        **_what_was_measured(job),
        # Of all blocks, including those pruned before an interruption.
        "seconds": {"prune": round(sum(cost["seconds"] for cost in costs), 3)},
        "peak_memory_bytes": max(cost["peak_memory_bytes"] or 0 for cost in costs),
        "versions": versions(),
    }
