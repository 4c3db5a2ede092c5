"""Prune SmolLM2-135M by 20 %, and show what that costs.

Usage: python examples/demo.py OUTPUT
"""

import logging
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import slimgpt
from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model

BASE = "smollm2-135m"
PROMPT = "A function in Python is defined with the keyword"


def main(output: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    start = time.monotonic()
    result = slimgpt.prune(BASE, output, ratio=0.2, calibration="pydocs", nsamples=64, seqlen=512)
    measured = slimgpt.evaluate(output, data=("pydocs",), seqlen=(512,), against=BASE).perplexity[0]
    tokenizer = AutoTokenizer.from_pretrained(output)

    table = Table("", "dense", "pruned", title=f"{BASE}, pruned by 20 %")
    plan = result.plan
    table.add_row("parameters", f"{plan.params_before:,}", f"{plan.params_after:,}")
    table.add_row("block parameters removed", "", f"{plan.block_ratio:.2%}")
    table.add_row("all parameters removed", "", f"{plan.total_ratio:.2%}")
    table.add_row("perplexity", f"{measured.base_perplexity:.2f}", f"{measured.perplexity:.2f}")
    table.add_row("KL to dense", "", f"{measured.kl_divergence:.3f}")
    dense, pruned = (
        continue_text(model, tokenizer)
        for model in (load_model(find_model(BASE)), AutoModelForCausalLM.from_pretrained(output))
    )
    table.add_row(f"“{PROMPT} …”", dense, pruned)
    console = Console(width=100)
    console.print(table)
    console.print(
        f"perplexity: {measured.data}, {measured.tokens:,} tokens in windows of {measured.seqlen}"
    )
    console.print(f"{time.monotonic() - start:.0f} s; the pruned model is in {output}")


def continue_text(model: PreTrainedModel, tokenizer: AutoTokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main(sys.argv[1])
