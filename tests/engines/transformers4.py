"""Write uniform results here, and check them in transformers 4; `transformers4.sh` runs both."""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = (
    "Hello world\n 12345 naïve 你好",
    "def f(x):\n    return x",
    "<|im_start|>user\nHi<|im_end|>",
)
OPTIONS = {"ratio": 0.2, "uniform": True, "calibration": "pydocs", "nsamples": 4, "seqlen": 64}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@torch.no_grad()
def compute(directory: Path) -> list[tuple[list[int], torch.Tensor]]:
    """Ids and logits of each text."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    return [(row, model(torch.tensor([row])).logits) for row in ids]


def write(work: Path) -> None:
    """Prune SmolLM2 and tiny models of each family with each kind of rotary embeddings."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import make_tiny_model

    import slimgpt
    from slimgpt.models.source import SMOLLM2_ALIAS, find_model
    from slimgpt.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(find_model(SMOLLM2_ALIAS))
    sources = {"smollm2": SMOLLM2_ALIAS}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        for name, rope in ROPES.items():
            sources[f"{family}-{name}"] = str(work / "source" / f"{family}-{name}")
            model = make_tiny_model(family, rope_parameters=rope, vocab_size=len(tokenizer))
            model.save_pretrained(sources[f"{family}-{name}"])
            tokenizer.save_pretrained(sources[f"{family}-{name}"])
            # As the class of the family, if it has one: that of Qwen splits text in its own way.
            own = AutoTokenizer.from_pretrained(sources[f"{family}-{name}"])
            own.save_pretrained(sources[f"{family}-{name}"])
    for name, source in sources.items():
        output = work / "results" / name
        slimgpt.prune(source, output, refit_epochs=0, **OPTIONS)
        torch.save(compute(output), work / f"{name}.pt")


def check(work: Path) -> None:
    """Compare what this version computes with what was written."""
    for file in sorted(work.glob("*.pt")):
        difference = 0.0
        results = zip(compute(work / "results" / file.stem), torch.load(file), strict=True)
        for (ids, logits), (expected_ids, expected) in results:
            assert ids == expected_ids, f"{file.stem}: {ids} instead of {expected_ids}"
            difference = max(difference, float((logits - expected).abs().max()))
        print(f"transformers {transformers.__version__}, {file.stem}: logits within {difference:g}")
        assert difference < 1e-4, file.stem


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
