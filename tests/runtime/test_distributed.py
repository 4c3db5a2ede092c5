"""Several processes on one machine against one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

import pytest
from conftest import TEXT
from ranks import run_ranks
from safetensors.torch import load_file

import slimgpt

pytestmark = pytest.mark.usefixtures("one_thread")  # as those that `torchrun` starts

OPTIONS = {"calibration": TEXT, "nsamples": 16, "seqlen": 32, "ratio": 0.4}


def torchrun(num_processes: int, *program: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={num_processes}", *program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def prune_arguments(model: Path, output: Path) -> list[str]:
    flags = [f"--{name}={value}" for name, value in OPTIONS.items()]
    return ["prune", str(model), "--output", str(output), *flags, "--json"]


@pytest.mark.parametrize(
    ("num_processes", "method", "launch"),
    [
        (2, "slimgpt", torchrun),
        (4, "slimgpt", run_ranks),
        (2, "flap", run_ranks),
        (2, "taylor", run_ranks),
    ],
)
def test_ranks_agree_with_one_process(
    num_processes: int,
    method: str,
    launch: Callable[..., subprocess.CompletedProcess[str]],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = tiny_checkpoint("llama")
    exact = {"refit_epochs": 0} if method == "slimgpt" else {}
    alone = slimgpt.prune(str(model), tmp_path / "alone", method=method, **OPTIONS | exact)
    output = tmp_path / "together"
    arguments = [*prune_arguments(model, output), f"--method={method}"]
    arguments += [f"--refit-epochs={epochs}" for epochs in exact.values()]
    finished = launch(num_processes, "-m", "slimgpt", *arguments)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)  # of one process
    assert finished.stderr.count("block 4/4") == 1
    for one, many in zip(alone.report["blocks"], report["blocks"], strict=True):
        for first, second in zip(one["sublayers"], many["sublayers"], strict=True):
            assert first["keep"] == second["keep"]
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    for name, tensor in load_file(output / "model.safetensors").items():
        # Float64 sums of the float32 products of each batch lose next to nothing in any order.
        assert (tensor - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_two_processes_refit_as_one(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model, output = tiny_checkpoint("llama"), tmp_path / "together"
    options = {"nsamples": 33, "seqlen": 64, "refit_epochs": 20, "widths": "scheduled"}
    alone = slimgpt.prune(str(model), tmp_path / "alone", **OPTIONS | options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    finished = run_ranks(2, "-m", "slimgpt", *prune_arguments(model, output), *flags)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    for one, many in zip(alone.report["blocks"], report["blocks"], strict=True):
        assert one["sublayers"][1]["refit"] < 0.97
        assert many["sublayers"][1]["refit"] == pytest.approx(
            one["sublayers"][1]["refit"], rel=1e-3
        )
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    for name, tensor in load_file(output / "model.safetensors").items():
        # Rounding grows in the steps of Adam.
        assert (tensor - expected[name]).norm() <= 0.01 * expected[name].norm(), name


def test_recovery_does_not_depend_on_the_number_of_processes(
    tiny_checkpoint: Callable[[str], Path],
    slim_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Loss and gradient of unequally many learned tokens; held-out text of three windows."""
    answers = [" ".join(map(str, range(i * i))) for i in range(12)]
    records = [{"instruction": "Count.", "output": answer} for answer in answers]
    (tmp_path / "counts.json").write_text(json.dumps(records), encoding="utf-8")
    options = {
        "method": "distill",
        "teacher": str(tiny_checkpoint("llama")),
        "data": str(tmp_path / "counts.json"),
        "tokens": 4 * 64,  # one step: the order is not the same
        "eval_data": "pydocs",
        "eval_tokens": 3 * 64,
        "seqlen": 64,
        "max_steps": 1,
        "batch_size": 4,
        "micro_batch_size": 2,
        "warmup_steps": 0,
        "device": "cpu",
        "dtype": "float32",
    }
    model = slim_checkpoint("llama")
    slimgpt.recover(str(model), tmp_path / "alone", **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arguments = ["recover", str(model), "--output", str(tmp_path / "together"), *flags, "--json"]
    finished = run_ranks(2, "-m", "slimgpt", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["steps"] == 1
    files = [tmp_path / name / "metrics.jsonl" for name in ("alone", "together")]
    one, many = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [set(entry) for entry in one] == [
        {"step", "perplexity", "kl"},
        {"step", "loss", "grad_norm", "learning_rate"},
        {"step", "perplexity", "kl"},
    ]
    for expected, entry in zip(one, many, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


def test_two_processes_prune_and_recover(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """In one command; the time is enough for all of the text but three held-out windows."""
    model, output = tiny_checkpoint("llama"), tmp_path / "out"
    arguments = [
        "prune", str(model), "--output", str(output), "--ratio=0.3", "--widths=scheduled",
        "--calibration", TEXT, "--nsamples=4", "--seqlen=64", "--device=cpu", "--json",
    ]  # fmt: skip
    # Both phases need a process group, of which torchrun's store allows one.
    finished = torchrun(2, "-m", "slimgpt", *arguments, "--recover", "2h")
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout)
    assert printed["pruned"] == str(tmp_path / "out-pruned")
    budget = printed["recovery"]["budget"]
    assert (budget["minutes"], budget["tokens"]) == (120, (3911 // 128 - 3) * 128)


def test_a_lost_process_ends_the_job_and_it_resumes(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, output = tiny_checkpoint("llama"), tmp_path / "slim"
    program = tmp_path / "dies.py"
    program.write_text(
        "import os, signal, time\n"
        "from slimgpt.cli import app\n"
        "from slimgpt.pruning import sequential\n"
        "from slimgpt.pruning.sensitivity import MeasuringSlimGPT\n"
        "prune_block = sequential.prune_block\n"
        "def dies(block, *args):\n"
        "    is_measuring = isinstance(args[2], MeasuringSlimGPT)\n"
        "    if block.index == 2 and not is_measuring and os.environ['RANK'] == '1':\n"
        "        time.sleep(2)  # until the other one waits for this one\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return prune_block(block, *args)\n"
        "sequential.prune_block = dies\n"
        "app.main()\n"
    )
    died = torchrun(2, program, *prune_arguments(model, output))
    assert died.returncode != 0
    assert "another process of this job has ended" in died.stderr, died.stderr
    assert "block 2/4" in died.stderr
    again = run_ranks(2, "-m", "slimgpt", *prune_arguments(model, output))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["output"] == str(output)


def test_a_lost_process_ends_the_training(
    slim_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    program = tmp_path / "dies.py"
    program.write_text(
        "import os, signal\n"
        "from slimgpt.cli import app\n"
        "from slimgpt.recovery import trainer\n"
        "training_step = trainer.RecoveryTrainer.training_step\n"
        "def dies(trainer, *args):\n"
        "    if trainer.state.global_step == 1 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return training_step(trainer, *args)\n"
        "trainer.RecoveryTrainer.training_step = dies\n"
        "app.main()\n"
    )
    arguments = ["recover", str(slim_checkpoint("llama")), "--output", str(tmp_path / "out")]
    arguments += ["--method=full", f"--data={TEXT}", "--max-examples=8", "--eval-data=pydocs"]
    arguments += ["--eval-tokens=128", "--seqlen=64", "--max-steps=3", "--batch-size=2"]
    arguments += ["--micro-batch-size=1", "--device=cpu"]
    died = run_ranks(2, program, *arguments)
    assert died.returncode != 0
    errors = [line for line in died.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, died.stderr
    assert "another process of this job has ended" in errors[0]
    assert "hint: see its message" in died.stderr
    assert "recover.py" not in died.stderr  # no traceback
    assert "internal error" not in died.stderr


def test_more_processes_than_batches_of_the_sensitivity_pass(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = prune_arguments(tiny_checkpoint("llama"), tmp_path / "slim")
    refused = run_ranks(2, "-m", "slimgpt", *arguments, "--nsamples=4", "--seqlen=64")
    assert refused.returncode != 0
    assert "1 samples make 1 batches for 2 processes" in refused.stderr
    assert "--widths scheduled" in refused.stderr
    done = run_ranks(
        2, "-m", "slimgpt", *arguments, "--nsamples=4", "--seqlen=64", "--widths=scheduled"
    )
    assert done.returncode == 0, done.stderr


LACKS_MEMORY = "memory.available_memory = lambda: 1024\n"
LACKS_GPU_MEMORY = """
estimate = inputs.estimate_memory
inputs.estimate_memory = lambda *args: replace(estimate(*args), device=torch.device("cuda", 1))
memory.free_gpu_memory = lambda device: (1024, 2048)
"""


@pytest.mark.parametrize(
    ("what_it_has", "free"),
    [
        (LACKS_MEMORY, "of memory, and 0.5 KiB are free"),
        (LACKS_GPU_MEMORY, "and 1.0 KiB of 2.0 KiB are free on cuda:1"),
    ],
    ids=["memory", "GPU memory"],
)
def test_what_one_process_lacks_ends_all(
    what_it_has: str, free: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The second process has less than the first."""
    output, program = tmp_path / "slim", tmp_path / "lacks.py"
    program.write_text(
        "import os, torch\n"
        "from dataclasses import replace\n"
        "from slimgpt.cli import app\n"
        "from slimgpt.pruning import inputs, memory\n"
        "if os.environ['RANK'] == '1':\n"
        f"{indent(what_it_has, ' ')}\n"
        "app.main()\n"
    )
    refused = run_ranks(2, program, *prune_arguments(tiny_checkpoint("llama"), output))
    assert refused.returncode == 2
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, refused.stderr
    assert all(free in error for error in errors)
    assert refused.stderr.count("hint: use ") == 2
    assert not list(output.glob("*.safetensors"))
