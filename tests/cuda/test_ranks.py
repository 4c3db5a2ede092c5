"""The GPU of each process, and a job of one process with NCCL."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TEXT
from devices import SLOW_ON_CPU
from safetensors.torch import load_file

import slimgpt
from slimgpt.errors import ConfigError
from slimgpt.models.device import find_device
from slimgpt.runtime.distributed import process_group


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine of two GPUs that torchrun has started a process on; what the process asked for."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda name, timeout: asked.update(name=name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    return asked


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_has_its_own_gpu(
    rank: int, joined: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with process_group(torch.device("cuda")) as device:
        assert device == torch.device("cuda", rank)
    assert joined == {"name": "cpu:gloo,cuda:nccl", "device": device}


@pytest.mark.parametrize(("rank", "asked"), [(2, "cuda"), (0, "cuda:0")])
@pytest.mark.usefixtures("joined")
def test_a_process_without_a_gpu_of_its_own_is_refused(
    rank: int, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    refused = pytest.raises(ConfigError, match=rf"process {rank} .* --device {asked}, 2 GPUs")
    with refused, process_group(torch.device(asked)):
        pass


@pytest.mark.parametrize(
    ("number", "is_built", "name", "message", "hint"),
    [
        (0, False, "cuda", "0 CUDA devices .* PyTorch .* is built without CUDA", "pytorch.org"),
        (0, True, "cuda", "0 CUDA devices were found$", "nvidia-smi"),
        (1, True, "cuda:1", "1 CUDA devices were found$", "or cuda:0"),
        (2, True, "cuda:7", "2 CUDA devices were found$", "or cuda:0 to cuda:1"),
        (2, True, "meta", "0 META devices were found$", "--device cpu"),
    ],
)
def test_a_device_that_this_machine_lacks(
    number: int,
    is_built: bool,
    name: str,
    message: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: is_built)
    with pytest.raises(ConfigError, match=f"device '{name}' is not available: {message}") as error:
        find_device(name)
    assert hint in str(error.value.hint)


@SLOW_ON_CPU
def test_a_job_of_one_process(
    device: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, options = str(tiny_checkpoint("llama")), {"nsamples": 12, "seqlen": 32, "ratio": 0.3}
    arguments = [f"--{name}={value}" for name, value in (options | {"device": device}).items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]
    prune = ["slimgpt", "prune", model, "--output", str(tmp_path / "job")]
    subprocess.run(
        [sys.executable, *torchrun, *prune, f"--calibration={TEXT}", *arguments], check=True
    )
    slimgpt.prune(model, tmp_path / "alone", calibration=TEXT, device=device, **options)
    of_job, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("job", "alone"))
    for name, tensor in alone.items():
        torch.testing.assert_close(of_job[name], tensor)
