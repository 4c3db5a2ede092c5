"""Plan a run on a large model: operations, bytes and minutes by phase, from its shape.

The operations are confirmed by counting them on small shapes (tests/pruning/test_large_models.py).
The minutes follow from rates that are assumed, see `Machine`; they are not measured. Usage:

    python benchmarks/large_models.py [--nsamples 128] [--seqlen 2048] [--ratio 0.5] [--gpus 1 8]

Symbols: ``C`` hidden size, ``Q`` width of the query heads, ``I`` columns of an output projection,
``O`` its rows, ``R`` removed columns, ``n`` tokens.
"""

import argparse
from typing import NamedTuple

from slimgpt.pruning.memory import refit_bytes, size, solver_bytes

HALF, FLOAT32 = 2, 4  # bytes of a number
ADAM_BYTES = 7 * FLOAT32  # weight, gradient and two moments read, weight and moments written
CAST_BYTES = 2 * FLOAT32 + 4 * HALF  # of a weight, to bfloat16 and back as a gradient
STEP_TOKENS = 512


class Model(NamedTuple):
    """Shape of a model with RMS norms and gated FFNs, or experts of which a token has some."""

    blocks: int
    hidden: int
    channels: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int = 32000
    experts: int = 0
    active: int = 0

    @property
    def query(self) -> int:
        """Columns of the output projection of attention."""
        return self.heads * self.head_dim

    @property
    def attention_params(self) -> int:
        """Parameters of attention in a block."""
        return self.hidden * 2 * (self.query + self.kv_heads * self.head_dim)

    @property
    def ffn_params(self) -> int:
        """Parameters of the FFN, or of one expert."""
        return 3 * self.hidden * self.channels

    @property
    def block_params(self) -> int:
        """Parameters of a block, without norms."""
        return self.attention_params + max(self.experts, 1) * self.ffn_params

    @property
    def params(self) -> int:
        """Parameters of the model, without norms."""
        return self.blocks * self.block_params + 2 * self.vocab * self.hidden


class Run(NamedTuple):
    """What a run does: tokens, the ratio of every sublayer, and what presets leave out."""

    nsamples: int = 128
    seqlen: int = 2048
    ratio: float = 0.5
    has_dense: bool = True
    refit_epochs: int = 1
    keeps_activations: bool = False

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.nsamples * self.seqlen


class Machine(NamedTuple):
    """Assumed rates: operations or bytes per second, seconds per pivot; of an H100 or H200."""

    bfloat16: float = 400e12
    tf32: float = 200e12
    float32: float = 40e12
    float64: float = 35e12
    memory: float = 2.5e12
    disk: float = 2e9
    pivot: float = 40e-6


MODELS = {
    "7B": Model(32, 4096, 11008, 32, 32),
    "70B": Model(80, 8192, 28672, 64, 8, vocab=128256),
    "400B mixture": Model(94, 4096, 2688, 64, 4, vocab=151936, experts=128, active=8),
}


def attention_input(model: Model, run: Run) -> float:
    """Operations to compute the input of attention's output projection, once for all tokens.

    Scores of all pairs are counted; a causal kernel leaves out half of them.
    """
    projections = model.attention_params - model.hidden * model.query
    return run.tokens * (2 * projections + 4 * run.seqlen * model.query)


def ffn_input(model: Model, tokens: float, kept: float = 1.0) -> float:
    """Operations to compute the input of an FFN's output projection, with some channels."""
    return tokens * 2 * kept * model.ffn_params * 2 / 3


def linear(tokens: float, num_in: float, num_out: int) -> float:
    """Operations of a linear layer."""
    return 2 * tokens * num_in * num_out


def gram(tokens: float, num_in: int, panel: int = 256) -> float:
    """Operations of the upper half of x xᵀ, in panels."""
    starts = range(0, num_in, panel)
    return sum(2 * tokens * min(panel, num_in - start) * (num_in - start) for start in starts)


def factorisation(num_in: int) -> float:
    """Operations of a Cholesky decomposition and an inverse, float64."""
    return float(num_in**3)


def elimination(num_out: int, num_in: int, removed: float, panel: int = 192) -> tuple[float, float]:
    """Operations of the removal of columns: those with H⁻¹ (float64), those with W (float32).

    The candidates are 1.5 times as many as the pivots of a panel. What is done again for discarded
    pivots is not counted.
    """
    left = num_in - removed / 2  # on average
    rows = removed**2 * num_in - 2 / 3 * removed**3
    candidates = 2 * 1.5**2 * panel * removed * (num_out + removed / 2)
    inner = 2 * panel * removed * (num_out + left)
    return rows + candidates + inner, 4 * num_out * removed * left


def refit(model: Model, run: Run) -> float:
    """Operations of the refit of an FFN: the target, then forward and backward of what is kept."""
    whole = run.tokens * 2 * model.ffn_params
    # Without the gradient of the input: two products of three in the first two layers.
    kept = (1 - run.ratio) * whole
    return run.refit_epochs * (whole + kept * (1 + 1 + 1 / 3))


def tokens_of_ffn(model: Model, run: Run) -> int:
    """Tokens that go through an FFN, or through the experts in all."""
    return run.tokens * (model.active or 1)


def forward(model: Model, run: Run) -> float:
    """Operations of the forward passes of a block, of the pruned and the dense model's streams."""
    hidden, query, kept = model.hidden, model.query, 1 - run.ratio
    is_mixture, tokens = model.experts > 0, tokens_of_ffn(model, run)
    refits = run.refit_epochs > 0 and not is_mixture
    passes = 1 + run.has_dense  # statistics, and the dense stream
    again = 0 if run.keeps_activations else 1
    total = (passes + again) * attention_input(model, run)
    total += linear(run.tokens, query * (kept + run.has_dense), hidden)
    total += (passes + (0 if refits else again)) * ffn_input(model, tokens)
    total += linear(tokens, model.channels * (kept + run.has_dense), hidden)
    if refits:
        total += ffn_input(model, tokens, kept)
    if is_mixture:  # the dense output once more, and what each expert takes over
        total += 2 * linear(tokens, model.channels, hidden) + ffn_input(model, tokens)
    return total


def cross(model: Model, run: Run) -> float:
    """Operations of the products of targets and inputs; the experts always have a target."""
    of_ffn = run.has_dense or model.experts > 0
    total = linear(run.tokens, model.query, model.hidden) * run.has_dense
    return total + linear(tokens_of_ffn(model, run), model.channels, model.hidden) * of_ffn


def seconds_by_phase(model: Model, run: Run, machine: Machine) -> dict[str, float]:
    """Seconds on one GPU for each phase of the pass over all blocks."""
    hidden, query, kept = model.hidden, model.query, 1 - run.ratio
    is_mixture, ffn_tokens = model.experts > 0, tokens_of_ffn(model, run)
    refits = run.refit_epochs > 0 and not is_mixture

    ffn_gram = gram(ffn_tokens, model.channels, 1024)
    statistics = gram(run.tokens, query, 1024) / machine.tf32
    # The inputs of experts are weighted, in float32.
    rate = machine.float32 if is_mixture else machine.tf32
    statistics += (ffn_gram + cross(model, run)) / rate

    solve = 0.0
    for columns, number in ((query, 1), (model.channels, model.experts or 1)):
        double, single = elimination(hidden, columns, run.ratio * columns)
        double += factorisation(columns)
        double += linear(columns, columns, hidden) * (run.has_dense or is_mixture)
        solve += number * (double / machine.float64 + single / machine.float32)
    pivots = (model.experts or 1) * run.ratio * model.channels
    solve += pivots * machine.pivot

    adam = 0.0
    if refits:
        steps = run.refit_epochs * run.tokens / STEP_TOKENS
        adam = steps * kept * model.ffn_params * (ADAM_BYTES + CAST_BYTES) / machine.memory
    block_bytes = HALF * model.block_params
    of_block = {
        "read": block_bytes / machine.disk,
        "forward": forward(model, run) / machine.bfloat16,
        "statistics": statistics,
        "solve": solve,
        "refit": refit(model, run) / machine.bfloat16 + adam if refits else 0.0,
        "write": 2 * kept * block_bytes / machine.disk,
    }
    return {phase: model.blocks * seconds for phase, seconds in of_block.items()}


def bytes_by_place(model: Model, run: Run) -> dict[str, float]:
    """Bytes on the GPU or host, by what they are for, and on disk."""
    removed = int(run.ratio * model.channels)
    sizes = [(model.hidden, model.query, int(run.ratio * model.query))]
    sizes += [(model.hidden, model.channels, removed)]
    solver = max(solver_bytes(*shape, run.has_dense, False) for shape in sizes)
    if model.experts:
        solver += run.tokens * (model.hidden + model.channels) * FLOAT32
    elif run.refit_epochs:
        kept = int((1 - run.ratio) * model.ffn_params)
        solver = max(solver, refit_bytes(model.ffn_params, kept, HALF))
    stream = (1 + run.has_dense) * run.tokens * model.hidden * HALF
    return {
        # The next one is copied meanwhile; the experts of a layer are there twice.
        "blocks": HALF * model.block_params * (3 if model.experts else 2),
        "solver or refit": solver,
        "streams": stream,
        "activations of a sublayer": run.tokens * max(model.query, model.channels) * HALF,
        "disk": 2 * HALF * ((1 - run.ratio) * model.blocks * model.block_params),
    }


def on_gpus(phases: dict[str, float], number: int) -> float:
    """Seconds with several GPUs: they share the samples; one of them solves, reads and writes."""
    shared = ("forward", "statistics", "refit")
    return sum(s / number if phase in shared else s for phase, s in phases.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8])
    args = parser.parse_args()
    run = Run(args.nsamples, args.seqlen, args.ratio)
    for name, model in MODELS.items():
        print(f"{name}: {model.params / 1e9:.1f}e9 parameters, {HALF * model.params / 1e9:.0f} GB")
        for place, number in bytes_by_place(model, run).items():
            print(f"    {place}: {size(number)}")
        phases = seconds_by_phase(model, run, Machine())
        print("    minutes:", ", ".join(f"{k} {s / 60:.1f}" for k, s in phases.items()))
        totals = (f"{n} GPUs {on_gpus(phases, n) / 60:.0f}" for n in args.gpus)
        print("    minutes in all:", ", ".join(totals))


if __name__ == "__main__":
    main()
