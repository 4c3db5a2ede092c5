"""Processes of one job as `torchrun` starts them, but forked from a server that has the imports."""

import os
import runpy
import socket
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

TIME_LIMIT = 120  # seconds

_context = get_context("forkserver")
_context.set_forkserver_preload(
    [
        "transformers.models.llama.modeling_llama",
        "slimgpt.cli.app",
        "slimgpt.pruning.prune",
        "slimgpt.recovery.trainer",
        "slimgpt.recovery.recover",
    ]
)


def run_ranks(num_processes: int, *program: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program, ``-m MODULE …`` or ``FILE …``, once for each rank."""
    words = list(map(str, program))
    with socket.create_server(("127.0.0.1", 0)) as free, TemporaryDirectory() as folder:
        port = free.getsockname()[1]
        free.close()
        ranks = [
            _context.Process(target=_run_rank, args=(words, rank, num_processes, port, folder))
            for rank in range(num_processes)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIME_LIMIT)
            process.kill()
            process.join()
        code = next((process.exitcode for process in ranks if process.exitcode), 0)
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, code, out, err)


def _run_rank(words: list[str], rank: int, num_processes: int, port: int, folder: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
