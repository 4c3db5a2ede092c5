r"""Compare with what a user would install instead: size, perplexity, time, memory, and reloading.

Each rival prunes the same model on the same calibration tokens to about as many parameters as
`slimgpt` leaves at the ratio, in a process of its own. A fresh process then loads the checkpoint
with transformers and compares its logits with those before it was written.

- torch-pruning: its recipe for language models, as in its examples: the same fraction of heads, FFN
  channels and hidden dimensions goes, by the norm of the weights or by first-order importance. The
  fraction is found by trials, which count in its time and memory.
- optipfair: FFN channels alone, by its default score, with and without calibration data.
- block influence (ShortGPT, arXiv 2403.03853): whole layers that change the residual stream least.

They need an environment of their own: `pip install torch-pruning==1.6.1 optipfair==0.4.2` beside
slimgpt. Usage:

    python benchmarks/rivals.py --ratios 0.2 0.5 --text c4.jsonl \
        --texts wikitext.txt c4-heldout.jsonl pydocs --json rivals.json
"""

import argparse
import copy
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import write_json
from measured import add_options, folder
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimgpt
from slimgpt.data.samples import SampleOptions, calibration_tokens, evaluation_tokens
from slimgpt.evaluation.perplexity import mean_losses
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.runtime.environment import peak_memory

NUM_TRIALS = 12  # ratios that are tried to reach a number of parameters
PROBE_TOKENS = 64  # whose logits are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--text", required=True, help="plain text to calibrate on")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # what, rival, ratio
    args = parser.parse_args()
    if args.step:
        what, rival, ratio = args.step
        STEPS[what](rival, float(ratio), args)
        return
    rows = [measure(rival, ratio, args) for ratio in args.ratios for rival in args.rivals]
    report(rows, args)


def place(rival: str, ratio: float, args: argparse.Namespace) -> Path:
    """Folder of a result."""
    names = ("model", "text", "nsamples", "sample_length", "texts", "seqlen", "max_tokens")
    settings = {name: getattr(args, name) for name in names}
    return folder(args.work, f"{rival}-{ratio}", **settings)


def measure(rival: str, ratio: float, args: argparse.Namespace) -> dict[str, Any]:
    """Prune and reload, each in a process of its own, or read what was stored."""
    file = place(rival, ratio, args) / "rival.json"
    if not file.exists():
        command = [sys.executable, *sys.argv, "--step"]
        subprocess.run([*command, "prune", rival, str(ratio)], check=True)
        found = json.loads(file.with_suffix(".pruned").read_text())
        if "reloads" not in found:
            done = subprocess.run(
                [*command, "reload", rival, str(ratio)], capture_output=True, text=True, check=False
            )
            lines = done.stderr.strip().splitlines() or [""]
            found["reloads"] = done.stdout.strip() if not done.returncode else f"no: {lines[-1]}"
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def prune(rival: str, ratio: float, args: argparse.Namespace) -> None:
    """Prune with a rival; write the model, its measurements and its logits."""
    directory = place(rival, ratio, args)
    tokenizer = load_tokenizer(find_model(args.model))
    options = SampleOptions(args.nsamples, args.sample_length)
    samples_NT = calibration_tokens(args.text, tokenizer, options)
    start = time.monotonic()
    if rival.startswith("slimgpt"):
        with tempfile.TemporaryDirectory(dir=args.work.parent) as scratch:
            slimgpt.prune(args.model, Path(scratch) / "slim", ratio=ratio, **ours(rival, args))
            model = AutoModelForCausalLM.from_pretrained(
                Path(scratch) / "slim", trust_remote_code=True, dtype=torch.float32
            )
    else:
        model = load_model(find_model(args.model), "float32", "cpu").requires_grad_()
        num_params = slimgpt.plan(args.model, ratio=ratio, widths="scheduled").params_after
        model = RIVALS[rival](model, samples_NT, num_params)
    seconds, memory = time.monotonic() - start, peak_memory()
    found: dict[str, Any] = {
        "rival": rival,
        "ratio": ratio,
        "params": model.num_parameters(),
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "perplexity": [],
    }
    for name in args.texts:
        tokens_T = evaluation_tokens(name, tokenizer, args.max_tokens)
        (length,) = args.seqlen
        windows_NT = tokens_T[: len(tokens_T) // length * length].view(-1, length)
        nll = mean_losses(model.eval(), None, windows_NT).nll
        found["perplexity"].append({"data": Path(name).name, "perplexity": math.exp(nll)})
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(logits(model, samples_NT), directory / "logits.pt")
    try:
        model.save_pretrained(directory)
    except Exception as err:  # whatever a rival's model raises is its result
        found["reloads"] = "cannot be saved: " + " ".join(str(err.__cause__ or err).split())
    (directory / "rival.pruned").write_text(json.dumps(found))


def reload(rival: str, ratio: float, args: argparse.Namespace) -> None:
    """Load a checkpoint as its user would; print whether its logits are those before."""
    directory = place(rival, ratio, args)
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=rival.startswith("slimgpt"), dtype=torch.float32
    ).eval()
    options = SampleOptions(args.nsamples, args.sample_length)
    tokenizer = load_tokenizer(find_model(args.model))
    samples_NT = calibration_tokens(args.text, tokenizer, options)
    before = torch.load(directory / "logits.pt", weights_only=True)
    difference = float((logits(model, samples_NT) - before).abs().max())
    print("yes" if difference < 1e-3 else f"no: logits differ by {difference:.1g}")


STEPS = {"prune": prune, "reload": reload}


@torch.no_grad()
def logits(model: PreTrainedModel, samples_NT: Tensor) -> Tensor:
    """Logits of a few tokens."""
    return model(samples_NT[:1, :PROBE_TOKENS], use_cache=False).logits


def ours(rival: str, args: argparse.Namespace) -> dict[str, Any]:
    """Options of slimgpt: the defaults, or the paper's text and objective."""
    shared = {"nsamples": args.nsamples, "seqlen": args.sample_length}
    if rival == "slimgpt exact":
        return shared | {"calibration": args.text, "preset": "exact"}
    return shared | {"calibration": (args.text, "self")}


def with_torch_pruning(importance: str) -> Callable[..., PreTrainedModel]:
    """Group importance of heads, channels and hidden dimensions."""

    def prune_to(model: Any, samples_NT: Tensor, num_params: int) -> PreTrainedModel:
        if importance == "taylor":
            for sample_T in samples_NT:
                model(sample_T[None], labels=sample_T[None], use_cache=False).loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]

        def at(ratio: float) -> Any:
            narrow = copy.deepcopy(model)
            for parameter, gradient in zip(narrow.parameters(), gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            remove_groups(narrow, importance, ratio)
            return narrow

        return nearest(at, num_params)

    return prune_to


def remove_groups(model: Any, importance: str, ratio: float) -> None:
    """Prune in place with Torch-Pruning, and write the new sizes into the config."""
    import torch_pruning

    config = model.config
    model.set_attn_implementation("eager")  # which repeats the kv heads where they can be traced
    attentions = [block.self_attn for block in model.model.layers]
    heads = {a.q_proj: config.num_attention_heads for a in attentions}
    for a in attentions:
        heads |= {a.k_proj: config.num_key_value_heads, a.v_proj: config.num_key_value_heads}
    score = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
    }
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=torch.arange(8)[None],
        forward_fn=lambda model, ids: model(ids, use_cache=False).logits,
        importance=score[importance](),
        pruning_ratio=ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    first = attentions[0]
    config.hidden_size = model.lm_head.in_features
    config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    config.head_dim = first.head_dim
    config.num_attention_heads = first.q_proj.out_features // first.head_dim
    config.num_key_value_heads = first.k_proj.out_features // first.head_dim
    for attention in attentions:
        attention.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads


def nearest(at: Callable[[float], Any], num_params: int) -> Any:
    """Find a ratio by bisection at which a model has about as many parameters."""
    low, high, found = 0.0, 0.95, []
    for _ in range(NUM_TRIALS):
        model = at((low + high) / 2)
        found.append(model)
        if model.num_parameters() > num_params:
            low = (low + high) / 2
        else:
            high = (low + high) / 2
        found = [min(found, key=lambda model: abs(model.num_parameters() - num_params))]
    return found[0]


def with_optipfair(has_data: bool) -> Callable[..., PreTrainedModel]:
    """Channels of the FFNs alone."""

    def prune_to(model: Any, samples_NT: Tensor, num_params: int) -> PreTrainedModel:
        from optipfair import prune_model

        width, per_channel = model.config.intermediate_size, 3 * model.config.hidden_size
        gone = (model.num_parameters() - num_params) / model.config.num_hidden_layers / per_channel
        batches = [{"input_ids": sample_T[None]} for sample_T in samples_NT]
        data = {"dataloader": batches} if has_data else {}
        return prune_model(model, pruning_percentage=100 * gone / width, **data)

    return prune_to


@torch.no_grad()
def by_block_influence(model: Any, samples_NT: Tensor, num_params: int) -> PreTrainedModel:
    """Drop the layers with the least mean of 1 − cos(input, output)."""
    influence = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    for sample_T in samples_NT:
        streams = model(sample_T[None], use_cache=False, output_hidden_states=True).hidden_states
        for index, pair in enumerate(itertools.pairwise(streams)):
            influence[index] += (1 - cosine_similarity(*pair, dim=-1)).mean().double()
    influence[-1] = torch.inf  # the last stream is after the final norm
    layers = model.model.layers
    of_layer = sum(parameter.numel() for parameter in layers[0].parameters())
    number = round((model.num_parameters() - num_params) / of_layer)
    gone = set(influence.argsort()[:number].tolist())
    model.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(layers) if index not in gone
    )
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)
    return model


RIVALS: dict[str, Any] = {
    "slimgpt": None,
    "slimgpt exact": None,
    "torch-pruning magnitude": with_torch_pruning("magnitude"),
    "torch-pruning taylor": with_torch_pruning("taylor"),
    "optipfair": with_optipfair(has_data=False),
    "optipfair with data": with_optipfair(has_data=True),
    "block influence": by_block_influence,
}


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print one line for each model, and write all measurements as JSON."""
    title = (
        f"{args.model}, {args.nsamples} × {args.sample_length} tokens; windows of {args.seqlen} "
        f"tokens, first {args.max_tokens} tokens of each text, float32"
    )
    names = ("ratio", "rival", "parameters", "s", "peak memory, GiB", "reloads")
    table = Table(*names, title=title)
    for text in rows[0]["perplexity"]:
        table.add_column(f"PPL, {text['data']}")
    for row in rows:
        table.add_row(
            f"{row['ratio']:.0%}",
            row["rival"],
            f"{row['params']:,}",
            f"{row['seconds']:.0f}",
            f"{(row['peak_memory_bytes'] or 0) / 2**30:.1f}",
            row["reloads"],
            *(f"{text['perplexity']:.1f}" for text in row["perplexity"]),
        )
    Console(width=180).print(table)
    write_json(args.json, protocol=title, models=rows)


if __name__ == "__main__":
    main()
