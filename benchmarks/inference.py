"""Measure the speed-up of pruned models over dense ones, and compare it with the ideal by bytes.

SmolLM2 is pruned with the preset `exact`, on 8 windows of 256 tokens from Python's documentation.
The model of about 1B parameters has LLaMA's shape and random weights. Its pruned form has half the
width in every layer, because speed depends only on the shape. Usage:

    python benchmarks/inference.py [--subjects smollm2,llama-1b] [--engines transformers,llamacpp]
        [--threads 2] [--repeats 5] [--profile] [--json FILE]
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics

import torch
from environment import write_json
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import slimgpt
from slimgpt.benchmarking.results import BenchResult, Spread
from slimgpt.checkpoint.writer import pruned_config
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model

DTYPES = {"transformers": "float32", "llamacpp": "float16"}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear")


def smollm2_pairs(model: str, ratios: list[float], work: Path) -> Iterator[tuple[str, str, str]]:
    for ratio in ratios:
        output = work / f"{Path(model).name}-{ratio:.0%}"
        if not (output / "config.json").exists():  # an interrupted run continues
            options = {"preset": "exact", "calibration": "pydocs", "nsamples": 8, "seqlen": 256}
            slimgpt.prune(model, output, ratio=ratio, **options)
        yield f"SmolLM2-135M, {ratio:.0%}", str(output), model


def llama_pairs(num_layers: int, work: Path) -> Iterator[tuple[str, str, str]]:
    dense = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    half = pruned_config(dense, [(4, 4096)] * num_layers, True)
    paths = [
        str(save_random(config, work / name))
        for config, name in ((half, f"llama-{num_layers}-half"), (dense, f"llama-{num_layers}"))
    ]
    yield (f"LLaMA, {num_layers} layers of 2048, 50%", *paths)


def save_random(config: PreTrainedConfig, directory: Path) -> Path:
    """Write a model with random weights, and a tokenizer with few merges."""
    if not (directory / "tokenizer.json").exists():  # written last
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(
            topics.values(), 300, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def product_share(model: str, num_steps: int = 20) -> float:
    """Median fraction of a decoding step's time that is spent in matrix products."""
    live = load_model(find_model(model), "float32", "cpu")
    cache = live(torch.ones(1, 128, dtype=torch.long)).past_key_values
    token = torch.ones(1, 1, dtype=torch.long)
    live(token, past_key_values=cache)
    shares = []
    for _ in range(num_steps):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            live(token, past_key_values=cache)
        times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        shares.append(sum(times.get(name, 0) for name in PRODUCTS) / sum(times.values()))
    return statistics.median(shares)


def describe(speedup: Spread, ideal: float) -> tuple[str, str, str]:
    return (
        f"{speedup.median:.2f} ({speedup.low:.2f}–{speedup.high:.2f})",
        f"{ideal:.2f}",
        f"{speedup.median / ideal:.0%}",
    )


def rows_of(title: str, result: BenchResult) -> Iterator[tuple[str, ...]]:
    for setting in result.settings:
        lengths = f"{setting.batch_size} × {setting.prompt_length}"
        for phase, speedup, ideal in (
            ("prefill", setting.prefill_speedup, result.ideal_prefill),
            ("decode", setting.decode_speedup, result.ideal_decode),
        ):
            dtype = result.costs[0].dtype
            yield title, result.engine, dtype, lengths, phase, *describe(speedup, ideal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", default="smollm2,llama-1b")
    parser.add_argument("--engines", default="transformers,llamacpp")
    parser.add_argument("--model", default="smollm2-135m", help="SmolLM2, as a checkpoint or alias")
    parser.add_argument("--ratios", default="0.2,0.33,0.5")
    parser.add_argument("--num-layers", type=int, default=16, help="of the LLaMA; 16 are 1.1B")
    parser.add_argument("--batch-size", default="1")
    parser.add_argument("--prompt-length", default="128,512")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--profile", action="store_true", help="share of products in a step")
    parser.add_argument("--work", type=Path, help="directory that keeps the models for a rerun")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    table = Table("model", "engine", "dtype", "batch × prompt", "phase")
    for column in ("speed-up", "ideal", "of ideal"):
        table.add_column(column)
    subjects = args.subjects.split(",")
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        pairs = []
        if "smollm2" in subjects:
            ratios = [float(ratio) for ratio in args.ratios.split(",")]
            pairs += smollm2_pairs(args.model, ratios, work)
        if "llama-1b" in subjects:
            pairs += llama_pairs(args.num_layers, work)
        for title, pruned, dense in pairs:
            for engine in args.engines.split(","):
                result = slimgpt.bench(
                    pruned,
                    against=dense,
                    engine=engine,
                    dtype=DTYPES[engine],
                    device="cpu",
                    batch_size=args.batch_size,
                    prompt_length=args.prompt_length,
                    new_tokens=args.new_tokens,
                    repeats=args.repeats,
                    threads=args.threads,
                )
                results[f"{title}, {engine}"] = asdict(result)
                for row in rows_of(title, result):
                    table.add_row(*row)
            if args.profile:
                shares = (f"{product_share(model):.0%}" for model in (pruned, dense))
                names = ("pruned", "dense")
                text = ", ".join(f"{n} {s}" for n, s in zip(names, shares, strict=True))
                print(f"{title}: matrix products in a decoding step of transformers: {text}")
    Console(width=120).print(table)
    write_json(args.json, results=results)


if __name__ == "__main__":
    main()
