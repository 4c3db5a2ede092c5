"""Prune SmolLM2-135M by 20 %, and show what that costs.

Usage: python examples/demo.py OUTPUT
"""

import logging
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import slimgpt
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer
from slimgpt.runtime.progress import progress_bar

BASE = "smollm2-135m"
# Few and short samples, so that it takes a minute or two; more of both give a better model.
CALIBRATION = {"calibration": "pydocs", "nsamples": 32, "seqlen": 128, "widths": "scheduled"}
EVALUATION = {"data": "pydocs", "seqlen": 512, "max_tokens": 4096}
PROMPT = "A function in Python is defined with the keyword"


def main(output: str) -> None:
    stderr = Console(stderr=True)
    plain = RichHandler(console=stderr, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[plain])
    start = time.monotonic()
    dense = load_model(find_model(BASE))
    base = str(Path(output).with_name(BASE))  # which loads faster than the GGUF file
    dense.save_pretrained(base)
    load_tokenizer(find_model(BASE)).save_pretrained(base)
    with progress_bar(stderr) as progress:
        result = slimgpt.prune(base, output, ratio=0.2, progress=progress, **CALIBRATION)
    measured = slimgpt.evaluate(output, against=base, **EVALUATION).perplexity[0]
    tokenizer = AutoTokenizer.from_pretrained(output)
    pruned = AutoModelForCausalLM.from_pretrained(output)

    plan = result.plan
    table = Table("", "dense", "pruned", title=f"{BASE}, pruned by 20 %")
    table.add_row("parameters", f"{plan.params_before:,}", f"{plan.params_after:,}")
    table.add_row("block parameters removed", "", f"{plan.block_ratio:.2%}")
    table.add_row("all parameters removed", "", f"{plan.total_ratio:.2%}")
    table.add_row("perplexity", f"{measured.base_perplexity:.2f}", f"{measured.perplexity:.2f}")
    table.add_row("KL to dense", "", f"{measured.kl_divergence:.3f}")
    texts = (continue_text(model, tokenizer) for model in (dense, pruned))
    table.add_row(f"“{PROMPT} …”", *texts)
    console = Console(width=100)
    console.print(table)
    print(
        f"Calibrated on {CALIBRATION['nsamples']} samples of {CALIBRATION['seqlen']} tokens of the "
        f"Python documentation ({CALIBRATION['calibration']}); {time.monotonic() - start:.0f} s in "
        f"all.\n\n"
        f"{BASE} has {plan.params_before / 1e6:.0f} million parameters, and the model in {output} "
        f"{plan.params_after / 1e6:.0f} million, at a perplexity of {measured.perplexity:.2f} "
        f"instead of {measured.base_perplexity:.2f} on {measured.tokens:,} held-out tokens of "
        f"{measured.data} in windows of {measured.seqlen}.\n"
        f"Next, more and longer samples give a better model:\n"
        f"{Path(sys.executable).parent / 'slimgpt'} prune {BASE} --output slim --ratio 0.2 "
        f"--calibration pydocs --nsamples 64 --seqlen 512"
    )


def continue_text(model: PreTrainedModel, tokenizer: AutoTokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main(sys.argv[1])
