"""Measure memory and time of pruning a model of LLaMA-7B's shape, for several numbers of blocks.

A checkpoint with random bfloat16 weights is written block by block, pruned with scheduled widths in
a separate process, and deleted. Usage:

    python benchmarks/scale.py [--blocks 8 32] [--ratio 0.5] [--directory DIR] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from environment import write_json
from phases import PHASES, timed_phases
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

import slimgpt
from slimgpt.models.loading import build_skeleton
from slimgpt.models.weights import write_file
from slimgpt.runtime.environment import peak_memory


def write_model(
    directory: Path, num_blocks: int, hidden: int, channels: int, heads: int, device: str = "cpu"
) -> None:
    """Write a dense checkpoint with normal random weights, one file for each block."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=channels,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=num_blocks,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    write_tokenizer(directory)

    tensors = build_skeleton(config, torch.bfloat16).state_dict()
    generator = torch.Generator(device).manual_seed(0)

    def random(name: str) -> Tensor:
        values = torch.ones(tensors[name].shape, dtype=torch.bfloat16, device=device)
        if values.ndim > 1:
            values.normal_(0, 0.02, generator=generator)
        return values.cpu()

    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{block}.safetensors", {})[name] = tensor
    for file, contents in files.items():
        write_file(directory / file, contents, {"format": "pt"}, random)
    weight_map = {name: file for file, contents in files.items() for name in contents}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of 1,000 tokens."""
    from pydoc_data.topics import topics

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        topics.values(), 1000, special_tokens=["<s>", "</s>"], show_progress=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def prune(model: str, output: str, ratio: float) -> None:
    """Prune in this process, and print time and peak memory."""
    with timed_phases() as clock:
        options = {"calibration": "pydocs", "nsamples": 4, "seqlen": 256, "widths": "scheduled"}
        slimgpt.prune(model, output, ratio=ratio, **options)
    print(json.dumps({"phases": clock.seconds, "peak": peak_memory()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--directory", type=Path, help="scratch space for two models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prune", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prune:
        prune(*args.prune, args.ratio)
        return

    rows = []
    for num_blocks in args.blocks:
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            model, output = Path(directory, "dense"), Path(directory, "slim")
            write_model(model, num_blocks, args.hidden, args.channels, args.heads)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            finished = subprocess.run(
                [sys.executable, __file__, "--prune", model, output, f"--ratio={args.ratio}"],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            rows.append({"blocks": num_blocks, "size": size, **json.loads(finished.stdout)})
            print(json.dumps(rows[-1]), flush=True)

    title = (
        f"LLaMA shape, hidden {args.hidden}, FFN {args.channels}, {args.heads} heads, bfloat16, "
        f"{args.ratio:.0%}, 4 × 256 tokens, {torch.get_num_threads()} threads"
    )
    table = Table("blocks", "model", *PHASES, "peak memory", "of the first", title=title)
    table.caption = "phases in seconds for each block"
    for row in rows:
        seconds = (f"{row['phases'].get(phase, 0) / row['blocks']:.2f}" for phase in PHASES)
        growth = f"{row['peak'] / rows[0]['peak']:.3f}"
        table.add_row(str(row["blocks"]), size(row["size"]), *seconds, size(row["peak"]), growth)
    Console(width=100).print(table)
    write_json(args.json, protocol=title, rows=rows)


if __name__ == "__main__":
    main()
