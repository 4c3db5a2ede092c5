"""Damage a valid model directory, its data and its recipes at random, and run the commands on it.

The seed of a case chooses a file, a mutation and a command. The command runs in a fork of this
process, because the imports take longer than the command. A case fails if the command prints a
traceback or an internal error, is ended by a signal, or does not end. Run as
``python benchmarks/fuzz.py --seconds 600``; ``--seed N --cases 1`` repeats a case.
"""

import argparse
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Set before the imports that read these. One thread, because a fork keeps no other threads.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import slimgpt
from slimgpt.cli import app

NUMBERS = (0, -1, 1, 0.5, 7, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"))
VALUES = (*NUMBERS, None, True, "", "text", "\0", "\udcff", [], {}, [[]], {"a": {}}, "x" * 5000)
OPTIONS = ("--calibration", "DATA", "--nsamples", "2", "--seqlen", "16")
TRAINING = ("--data", "DATA", "--eval-data", "DATA", "--max-steps", "1", "--batch-size", "1")
COMMANDS = {
    "inspect": ("inspect", "MODEL"),
    "plan": ("prune", "MODEL", "--dry-run"),
    "prune": ("prune", "MODEL", "--output", "OUT", *OPTIONS),
    "recipe": ("prune", "MODEL", "--output", "OUT", *OPTIONS, "--recipe", "RECIPE"),
    "eval": ("eval", "MODEL", "--data", "DATA", "--seqlen", "16", "--max-tokens", "64"),
    "recover": ("recover", "MODEL", "--output", "OUT", *TRAINING, "--micro-batch-size", "1"),
    "export": ("export", "MODEL", "--output", "OUT"),
    "report": ("report", "MODEL"),
    "run": ("run", "GRID", "--output", "OUT"),
}
RECIPE = "ratio: 0.3\nmultiple_of: 4\ndtype: float32\n"
GRID = """title: A title
reproduces: Table 0
model: {model}
prune: {{calibration: [{data}], nsamples: 2, seqlen: 16}}
evaluate: {{data: [{data}], seqlen: [16], max_tokens: 64}}
grid: {{ratio: [0.3]}}
table: [parameters, perplexity]
"""


def make_model(directory: Path) -> None:
    """Write a valid pruned model, with results, data and recipes beside it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from pydoc_data.topics import topics

    from conftest import TINY, make_tiny_model
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained, base = ByteLevelBPETokenizer(), directory / "base"
    size = TINY["vocab_size"] - 8
    trained.train_from_iterator(topics.values(), size, special_tokens=["<s>", "</s>"])
    make_tiny_model("llama").save_pretrained(base)
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(base)
    options: dict[str, Any] = {"calibration": "pydocs", "nsamples": 2, "seqlen": 16}
    slimgpt.prune(str(base), directory / "model", ratio=0.3, max_shard_size=10**5, **options)
    slimgpt.evaluate(str(directory / "model"), data="pydocs", seqlen=16, max_tokens=64)
    text = "\n".join(topics.values())[:20_000]
    (directory / "data.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in text.splitlines() if line)
    )
    (directory / "recipe.yaml").write_text(RECIPE)


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, duplicate or insert bytes."""
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice((1, 8, 100)))
    middle = draw.choice((b"", draw.randbytes(end - start), content[start:end] * 3, b"\xff\x00"))
    return content[:start] + middle + (b"" if draw.random() < 0.2 else content[end:])


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """Change, remove or add a random value in JSON."""
    values = json.loads(content)
    inside = values
    while isinstance(inside, dict | list) and inside:
        key = draw.choice(list(inside)) if isinstance(inside, dict) else draw.randrange(len(inside))
        if isinstance(inside[key], dict | list) and inside[key] and draw.random() < 0.7:
            inside = inside[key]
            continue
        if draw.random() < 0.2:
            del inside[key]
        else:
            inside[key] = draw.choice(VALUES)
        return json.dumps(values).encode()
    return json.dumps(draw.choice(VALUES)).encode()


def damage_header(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    header = damage_json(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damage(file: Path, draw: random.Random) -> str:
    """Damage a file; return the kind of damage."""
    kinds: list[Callable[[bytes, random.Random], bytes]] = [damage_bytes]
    if file.suffix == ".json":
        kinds += [damage_json] * 4
    elif file.suffix == ".safetensors":
        kinds.append(damage_header)
    kind = draw.choice(kinds)
    file.write_bytes(kind(file.read_bytes(), draw))
    return f"{kind.__name__} of {file.name}"


def in_fork(function: Callable[[], Any]) -> int:
    """Run a function in a fork; return its exit status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except SystemExit as err:
            code = err.code if isinstance(err.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_command(command: list[str], place: Path, timeout: int) -> tuple[int, str]:
    """Run the command line; return its exit status and its stderr."""

    def run() -> None:
        os.chdir(place)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        signal.alarm(timeout)
        sys.argv = ["slimgpt", *command]
        app.main()

    code = in_fork(run)
    return code, (place / "stderr").read_text(encoding="utf-8", errors="replace")


def run_case(seed: int, valid: Path, timeout: int) -> tuple[str, str]:
    """Run a case; return its description, and its failure or an empty string."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(valid, place, dirs_exist_ok=True)
        data, model = place / "data.jsonl", place / "model"
        (place / "grid.yaml").write_text(GRID.format(model=model, data=data))
        files = sorted(f for f in model.rglob("*") if f.is_file() and f.suffix != ".md")
        files += [data, place / "recipe.yaml", place / "grid.yaml"]
        mutation = damage(draw.choice(files), draw)
        name = draw.choice(list(COMMANDS))
        words = {
            "MODEL": model, "OUT": place / "out", "DATA": data,
            "RECIPE": place / "recipe.yaml", "GRID": place / "grid.yaml",
        }  # fmt: skip
        command = [str(words.get(word, word)) for word in COMMANDS[name]]
        case = f"seed {seed}: {mutation}; slimgpt {' '.join(COMMANDS[name])}"
        code, errors = run_command(command, place, timeout)
    if code == -signal.SIGALRM:
        return case, f"no end after {timeout} s"
    for sign in ("Traceback", "internal error"):
        if sign in errors:
            lines = [line for line in errors.splitlines() if "rror" in line]
            return case, f"{sign}: {lines[0][:300] if lines else ''}"
    return case, f"exit code {code}" if code not in (0, 1, 2) else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--cases", type=int, default=10**9, help="maximum number of cases")
    parser.add_argument("--timeout", type=int, default=120, help="time limit of a case in seconds")
    options = parser.parse_args()
    wrong, count, end = [], 0, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        if in_fork(lambda: make_model(Path(folder))):
            return 1
        while count < options.cases and time.monotonic() < end:
            case, problem = run_case(options.seed + count, Path(folder), options.timeout)
            count += 1
            if problem:
                wrong.append(case)
                print(f"{case}\n  {problem}", flush=True)
    print(f"{count} cases, {len(wrong)} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
