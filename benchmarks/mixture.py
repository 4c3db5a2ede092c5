r"""Make a mixture of experts whose truth is known from a small dense model of the Llama type.

``copies``: each expert is a copy of the whole FFN. Routing weights sum to one, so the mixture
computes what the dense model computes, which is checked; then it is trained for a few steps, so
that the experts differ. (After a hundred steps at the default rate they are still nearly
interchangeable.) ``split``: each expert has some of the FFN's channels, clustered by their
activations; the router is a linear prediction of the norms of the experts' outputs, so its experts
differ from the start.

Only experts and routers are trained, with a loss that balances the load. An interrupted run goes on
from the last state in OUTPUT if it is started with the same options. Usage:

    python benchmarks/mixture.py OUTPUT --text c4.jsonl --texts wikitext.txt pydocs
    python benchmarks/mixture.py OUTPUT --text c4.jsonl --kind split --experts 16 --top-k 12 \
        --steps 0 --texts wikitext.txt pydocs

Shape suffixes: ``T`` tokens, ``C`` hidden size, ``E`` experts, ``I`` channels of the dense FFN,
``K`` routed experts of a token.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from environment import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from slimgpt.data.datasets import describe_dataset
from slimgpt.data.samples import calibration_tokens, evaluation_tokens
from slimgpt.evaluation.perplexity import mean_losses
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.runtime.files import replacing

STATE = "training.pt"

# Keys that both configs have, with the same meaning.
COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip

# So small that the routing weights of ``split`` are equal; the choice of experts is the same.
FLAT = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the mixture")
    parser.add_argument("--model", default="smollm2-135m", help="dense model of the Llama type")
    parser.add_argument("--kind", default="copies", choices=["copies", "split"])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--text", required=True, help="text to train on, and to cluster by")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the balance's loss")
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16 where possible")
    parser.add_argument("--save-every", type=int, default=20, help="steps between two states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", nargs="+", default=[], help="texts that are evaluated")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=7680)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    source = find_model(args.model)
    dense, tokenizer = load_model(source, "float32", "cpu"), load_tokenizer(source)
    samples = calibration_tokens(
        args.text, tokenizer, max(args.steps, 8) * args.batch_size, args.seqlen, args.seed
    )
    mixture = make_mixture(dense, samples[:8], args)
    texts = {
        name: evaluation_tokens(name, tokenizer, args.max_tokens).unfold(0, *[args.window] * 2)
        for name in args.texts
    }
    if args.kind == "copies":
        check_same(dense, mixture, samples[:1])
    results = {"untrained": measure(mixture, dense, texts)}
    args.output.mkdir(parents=True, exist_ok=True)
    history = train(mixture, samples, args) if args.steps else []
    results["trained"] = measure(mixture, dense, texts) if args.steps else results["untrained"]
    loads = loads_of(routed(mixture, samples[:8]))
    mixture.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report(results, loads, history, args)


def make_mixture(dense: PreTrainedModel, samples: Tensor, args: argparse.Namespace) -> Any:
    """Build the mixture; all but the experts and routers are those of the dense model."""
    config = dense.config
    size = config.intermediate_size
    if args.kind == "split" and size % args.experts:
        raise SystemExit(f"{size} channels cannot be divided by {args.experts} experts")
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **{key: getattr(config, key) for key in COMMON},
            intermediate_size=size if args.kind == "copies" else size // args.experts,
            num_local_experts=args.experts,
            num_experts_per_tok=args.top_k,
        )
    )
    mixture.load_state_dict(dense.state_dict(), strict=False)
    mixture.requires_grad_(False).eval()
    fill = copy_experts if args.kind == "copies" else split_channels
    layers = zip(dense.model.layers, mixture.model.layers, ffn_inputs(dense, samples), strict=True)
    for old, new, inputs_TC in layers:
        fill(old.mlp, new.mlp, inputs_TC)
    return mixture


@torch.no_grad()
def ffn_inputs(model: PreTrainedModel, samples: Tensor) -> list[Tensor]:
    """Inputs of the FFN of each layer, (T, C)."""
    found: list[Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, given: found.append(given[0].flatten(0, 1)))
        for layer in model.model.layers
    ]
    model.model(samples, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def copy_experts(dense: Any, sparse: Any, inputs_TC: Tensor) -> None:
    """Make each expert the whole FFN, and the router random.

    Its rows have no part in the direction of the mean input: otherwise most tokens would choose the
    same experts. Each is scaled so that its logits have standard deviation one.
    """
    gate_up = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
    sparse.experts.gate_up_proj.copy_(gate_up.expand_as(sparse.experts.gate_up_proj))
    sparse.experts.down_proj.copy_(dense.down_proj.weight.expand_as(sparse.experts.down_proj))
    mean_C = functional.normalize(inputs_TC.mean(dim=0), dim=0)
    rows_EC = torch.randn_like(sparse.gate.weight)
    rows_EC -= (rows_EC @ mean_C)[:, None] * mean_C
    sparse.gate.weight.copy_(rows_EC / (inputs_TC @ rows_EC.T).std(dim=0)[:, None])


def split_channels(dense: Any, sparse: Any, inputs_TC: Tensor) -> None:
    """Divide the channels among the experts, and fit the router to the norms of their outputs."""
    experts, num_experts = sparse.experts, sparse.gate.num_experts
    gate, up, down = (p.weight for p in (dense.gate_proj, dense.up_proj, dense.down_proj))
    activations_TI = functional.silu(inputs_TC @ gate.T) * (inputs_TC @ up.T)
    groups = balanced_clusters(functional.normalize(activations_TI.abs().T), num_experts)
    norms_TE = torch.stack(
        [(activations_TI[:, rows] @ down[:, rows].T).norm(dim=1) for rows in groups], dim=1
    )
    for expert, rows in enumerate(groups):
        experts.gate_up_proj[expert] = torch.cat([gate[rows], up[rows]])
        experts.down_proj[expert] = down[:, rows] * sparse.top_k
    weights_CE = torch.linalg.lstsq(inputs_TC, norms_TE / norms_TE.std(), driver="gels").solution
    sparse.gate.weight.copy_(FLAT * weights_CE.T)


def balanced_clusters(points: Tensor, num_clusters: int, rounds: int = 10) -> list[Tensor]:
    """Cluster unit vectors by k-means with equally many in each cluster.

    In each round the points choose in the order of how much they prefer their best centre over the
    next one; a full cluster takes no more.
    """
    size = len(points) // num_clusters
    centres = points[torch.randperm(len(points))[:num_clusters]]
    clusters: list[list[int]] = []
    for _ in range(rounds):
        similarity = points @ centres.T
        best = similarity.topk(2, dim=1).values
        wishes = similarity.argsort(dim=1, descending=True).tolist()
        clusters = [[] for _ in range(num_clusters)]
        for point in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            next(c for w in wishes[point] if len(c := clusters[w]) < size).append(point)
        centres = functional.normalize(torch.stack([points[c].mean(dim=0) for c in clusters]))
    return [torch.tensor(sorted(cluster)) for cluster in clusters]


@torch.no_grad()
def check_same(dense: PreTrainedModel, mixture: Any, samples: Tensor) -> None:
    """Check that the mixture computes what the dense model computes."""
    logits, expected = (m(samples, use_cache=False).logits for m in (mixture, dense))
    difference = float((logits - expected).abs().max())
    print(f"largest difference of the logits from the dense model's: {difference:.1e}", flush=True)
    if difference > 1e-3:
        raise SystemExit("the mixture does not compute what the dense model computes")


def train(mixture: Any, samples: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train experts and routers; return the loss and the load of every step."""
    trained = [p for layer in mixture.model.layers for p in layer.mlp.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate, fused=True)
    file = args.output / STATE
    history: list[dict[str, Any]] = []
    if file.exists():
        state = torch.load(file)
        history = state["history"]
        optimizer.load_state_dict(state["optimizer"])
        for parameter, values in zip(trained, state["parameters"], strict=True):
            parameter.data.copy_(values)
        print(f"going on after step {len(history)}", flush=True)
    batches = samples.split(args.batch_size)
    for step in range(len(history), args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / args.steps)
        history.append(train_step(mixture, batches[step], optimizer, args))
        print(json.dumps({"step": step + 1, **history[-1]}), flush=True)
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            with replacing(file) as temporary:
                state = {"optimizer": optimizer.state_dict(), "parameters": trained}
                torch.save(state | {"history": history}, temporary)
    file.unlink(missing_ok=True)
    mixture.requires_grad_(False)
    return history


def train_step(
    mixture: Any, batch: Tensor, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> dict[str, Any]:
    """One step of Adam."""
    start = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
        output = mixture(batch, labels=batch, use_cache=False, output_router_logits=True)
    balance = torch.stack([balance_loss(x, args.top_k) for x in output.router_logits]).mean()
    # The model's loss has its own balance in it, over all layers together.
    loss = output.loss - mixture.router_aux_loss_coef * output.aux_loss
    (loss + args.balance * balance).backward()
    optimizer.step()
    optimizer.zero_grad()
    loads = loads_of([x.topk(args.top_k).indices for x in output.router_logits])
    return {
        "loss": round(loss.item(), 4),
        "balance": round(balance.item(), 4),
        "load": [round(x, 3) for x in loads.mean(dim=0).tolist()],
        "largest": round(loads.max().item(), 3),
        "seconds": round(time.monotonic() - start, 1),
    }


def balance_loss(logits_TE: Tensor, top_k: int) -> Tensor:
    """Loss of the Switch Transformer: one if every expert has the same load."""
    probabilities_TE = logits_TE.float().softmax(dim=1)
    chosen_TK = probabilities_TE.topk(top_k).indices
    loads_E = torch.zeros_like(probabilities_TE).scatter_(1, chosen_TK, 1 / top_k).mean(dim=0)
    return len(loads_E) * (loads_E * probabilities_TE.mean(dim=0)).sum()


@torch.no_grad()
def routed(mixture: Any, samples: Tensor) -> list[Tensor]:
    """Experts of each token, for each layer."""
    output = mixture(samples, use_cache=False, output_router_logits=True)
    return [x.topk(mixture.config.num_experts_per_tok).indices for x in output.router_logits]


def loads_of(layers: list[Tensor]) -> Tensor:
    """Part of the routed tokens that each expert gets, (layers, E)."""
    num_experts = 1 + max(int(chosen.max()) for chosen in layers)
    return torch.stack(
        [chosen.flatten().bincount(minlength=num_experts) / chosen.numel() for chosen in layers]
    )


def measure(mixture: Any, dense: PreTrainedModel, texts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Perplexity of both models on each text, and the KL divergence from the dense one."""
    rows = []
    for name, windows in texts.items():
        losses = mean_losses(mixture, dense, windows)
        rows.append(
            {
                "text": describe_dataset(name, "evaluation"),
                "perplexity": math.exp(losses.nll),
                "dense_perplexity": math.exp(losses.base_nll),
                "kl_divergence": losses.kl_divergence,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def report(
    results: dict[str, list[dict[str, Any]]],
    loads: Tensor,
    history: list[dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    """Print the perplexities and loads, and write them as JSON."""
    title = (
        f"{args.model}, {args.kind}, top {args.top_k} of {args.experts} experts, {args.steps} "
        f"steps of {args.batch_size} × {args.seqlen} tokens of {Path(args.text).name}; windows of "
        f"{args.window}, {args.max_tokens} tokens"
    )
    table = Table("text", "dense", *results, "KL", title=title)
    for first, last in zip(results["untrained"], results["trained"], strict=True):
        table.add_row(
            first["text"],
            *(f"{x:.2f}" for x in (first["dense_perplexity"], first["perplexity"])),
            f"{last['perplexity']:.2f}",
            f"{last['kl_divergence']:.3f}",
        )
    Console(width=120).print(table)
    print("load of each expert, mean of the layers:", *(f"{x:.3f}" for x in loads.mean(dim=0)))
    print(f"in one layer from {loads.min():.3f} to {loads.max():.3f}")
    print(f"training took {sum(step['seconds'] for step in history):.0f} s")
    found = {"results": results, "loads": loads.tolist(), "steps": history}
    write_json(args.json, protocol=title, **found)


if __name__ == "__main__":
    main()
