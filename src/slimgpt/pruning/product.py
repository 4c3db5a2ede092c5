"""Put the pruned model and its report together."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from slimgpt.checkpoint.card import write_card
from slimgpt.checkpoint.results import REPORT_FILE
from slimgpt.checkpoint.tokenizer import write_tokenizer
from slimgpt.checkpoint.writer import add_older_rope_keys, pruned_config, write_shards
from slimgpt.config import PruneConfig
from slimgpt.data.datasets import describe_dataset
from slimgpt.models.device import fast_dtype
from slimgpt.models.stored import read_tensor
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weights import read_metadata, saved_tensors, tensor_names
from slimgpt.pruning.plan import PrunePlan
from slimgpt.runtime.environment import versions
from slimgpt.runtime.run_directory import Run


def write_product(
    run: Run,
    streamed: StreamedModel,
    planned: PrunePlan,
    config: PruneConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    report: dict[str, Any],
) -> None:
    """Put the product together from the finished blocks and the tensors that stay."""
    start = time.monotonic()
    files = [run.saved(run.block_file(index)) for index in range(len(planned.widths))]
    finished = {name: file for file in files for name in tensor_names(file)}

    def read(name: str) -> Tensor:
        file = finished.get(name)
        return read_tensor(file, name) if file else streamed.weights.read(name)

    model = streamed.skeleton
    small_config = pruned_config(model.config, planned.widths, config.uniform)
    small_config.dtype = streamed.weights.dtype
    with run.product() as directory:
        small_config.save_pretrained(directory)
        add_older_rope_keys(directory)
        generation_config.save_pretrained(directory)
        write_tokenizer(streamed.weights.source, tokenizer, directory)
        write_shards(directory, saved_tensors(model), read, config.max_shard_size)
        report["seconds"]["save"] = round(time.monotonic() - start, 3)
        (directory / REPORT_FILE).write_text(json.dumps(report) + "\n", encoding="utf-8")
        write_card(directory)


def make_report(
    run: Run,
    streamed: StreamedModel,
    planned: PrunePlan,
    config: PruneConfig,
    seqlen: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Make the content of ``pruning_report.json``."""
    files = [run.saved(run.block_file(index)) for index in range(len(planned.widths))]
    metadata = [read_metadata(file) for file in files]
    costs = [json.loads(block["cost"]) for block in metadata]
    return {
        # The report goes to the hub with the model, so it holds no local paths.
        "base_model": streamed.weights.source.title,
        "config": config.model_dump()
        | {"calibration": [Path(name).name for name in config.calibration]},
        "dtype": str(streamed.weights.dtype).removeprefix("torch."),
        "products": str(fast_dtype(streamed.device, streamed.weights.dtype)).removeprefix("torch."),
        "device": str(streamed.device),
        "calibration": {
            "data": " + ".join(describe_dataset(n, "calibration") for n in config.calibration),
            "nsamples": config.nsamples,
            "seqlen": seqlen,
        },
        **asdict(planned),
        "blocks": [json.loads(block["plan"]) for block in metadata],
        "seconds": seconds | {"prune": round(sum(cost["seconds"] for cost in costs), 3)},
        "peak_memory_bytes": max(cost["peak_memory_bytes"] or 0 for cost in costs),
        "versions": versions(),
    }
