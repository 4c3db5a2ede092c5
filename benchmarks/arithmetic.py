r"""Count the right sums that models give: dense, pruned and recovered, on the same questions.

A question is the sum of two numbers below --below after six solved examples, which are drawn anew
for each. It counts if greedy decoding gives the sum and then the end of the line. Guessing the
commonest sum is right for one in --below questions. Usage:

    python benchmarks/arithmetic.py smollm2-135m slim recovered --questions 500 --json sums.json
    python benchmarks/arithmetic.py --write-prompts prompts.txt --questions 2000

The second form writes questions of another seed, for `slimgpt recover --data self --prompts`.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from environment import write_json
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.models.loading import load_model
from slimgpt.models.source import find_model
from slimgpt.models.tokenizer import load_tokenizer

SHOTS = 6

PROMPTS_SEED = 10**6  # added to that of the questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names or folders of models")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--below", type=int, default=10, help="the numbers are below this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--write-prompts", type=Path, help="write chat questions, one per line")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.write_prompts:
        pairs = random.Random(args.seed + PROMPTS_SEED)
        lines = [f"What is {a} + {b}?\n" for a, b in draw(pairs, args.below, args.questions)]
        args.write_prompts.write_text("".join(lines), encoding="utf-8")
    if not args.models:
        return
    rows = [{"model": model, **measure(model, args)} for model in args.models]
    title = f"{args.questions} sums of two numbers below {args.below}, {SHOTS} shots, {args.dtype}"
    table = Table("model", "right", title=title)
    for row in rows:
        table.add_row(row["model"], f"{row['accuracy']:.1%} ± {row['stderr']:.1%}")
    Console().print(table)
    write_json(args.json, protocol=title, models=rows)


def draw(random_: random.Random, below: int, number: int) -> list[tuple[int, int]]:
    """Draw pairs of numbers."""
    return [(random_.randrange(below), random_.randrange(below)) for _ in range(number)]


def questions(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Write each question with its solved examples, and its answer."""
    random_, found = random.Random(args.seed), []
    for _ in range(args.questions):
        *shots, (a, b) = draw(random_, args.below, SHOTS + 1)
        solved = "".join(f"{c} + {d} = {c + d}\n" for c, d in shots)
        found.append((f"{solved}{a} + {b} = ", f"{a + b}\n"))
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the share of right answers, and its standard error."""
    source = find_model(name)
    tokenizer, model = load_tokenizer(source), load_model(source, args.dtype, "auto")
    asked, right = questions(args), 0
    for start in range(0, len(asked), args.batch_size):
        right += num_right(model, tokenizer, asked[start : start + args.batch_size])
    share = right / len(asked)
    return {"accuracy": share, "stderr": math.sqrt(share * (1 - share) / len(asked))}


@torch.no_grad()
def num_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[tuple[str, str]]
) -> int:
    """Count the questions of which greedy decoding gives the answer.

    That is so if each token of the answer is the likeliest one after those before it.
    """
    prompts = [tokenizer(prompt).input_ids for prompt, _ in asked]
    answers = [tokenizer(answer, add_special_tokens=False).input_ids for _, answer in asked]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))  # padded on the right, which a causal model does not see
    padded = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
    likeliest = model(padded, use_cache=False).logits.argmax(-1).tolist()
    return sum(
        guess[len(prompt) - 1 : len(row) - 1] == answer
        for guess, prompt, answer, row in zip(likeliest, prompts, answers, rows, strict=True)
    )


if __name__ == "__main__":
    main()
