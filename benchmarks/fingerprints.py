"""Fingerprints of eight small runs, which show whether a code change alters any result.

Each run prunes SmolLM2-135M in float32 with one thread, on a few samples of the bundled text. It
prints the SHA-256 of the weights (all `.safetensors` files) and of the kept units of every
sublayer (canonical JSON). Equal lists on one machine mean equal results. Other processors may round
differently.
"""

import json
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import typer

import slimgpt

COMMON = {"calibration": "pydocs", "nsamples": 24, "seqlen": 256, "dtype": "float32"}
RUNS = {
    "default": {"calibration": "pydocs,self", "nsamples": 32},
    "exact": {"preset": "exact"},
    "paper": {"preset": "paper"},
    "scheduled": {"widths": "scheduled"},
    "flap": {"method": "flap"},
    "taylor": {"method": "taylor", "nsamples": 8},
    "uniform": {"uniform": True},
    "layer_ratios": {"layer_ratios": [0.3, 0.6, 0.0, 0.4]},
}


def main(names: list[str] = typer.Argument(None, help="Some of the runs. Default: all.")) -> None:  # noqa: B008
    torch.set_num_threads(1)
    for name in names or RUNS:
        with TemporaryDirectory() as folder:
            output = Path(folder) / "out"
            result = slimgpt.prune("smollm2-135m", output, **COMMON | RUNS[name])
            weights = sha256()
            for file in sorted(output.glob("*.safetensors")):
                weights.update(file.read_bytes())
            kept = [{s.kind: s.keep for s in block.sublayers} for block in result.blocks]
            units = sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
            print(f"{name:12} {weights.hexdigest()} {units.hexdigest()}", flush=True)


if __name__ == "__main__":
    typer.run(main)
