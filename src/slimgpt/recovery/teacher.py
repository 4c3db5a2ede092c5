"""The predictions of the dense model for the text of a recovery, stored on disk.

Shapes: N windows, T tokens of a window, P = T - 1 predictions in it, V vocabulary, K likeliest
tokens.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from slimgpt.config import RecoverConfig
from slimgpt.data.examples import IGNORED
from slimgpt.data.samples import Windows
from slimgpt.errors import NumericalError
from slimgpt.models.stored import read_tensor
from slimgpt.runtime.distributed import training_together
from slimgpt.runtime.files import reading
from slimgpt.runtime.run_directory import LOGITS_FILE, Run

log = logging.getLogger(__name__)

FILE_TOKENS = 2**15  # whose predictions are in one file: what is lost if a run is interrupted

SMALL_VOCABULARY = 2**16  # up to which token ids take two bytes

Teacher = Callable[[], PreTrainedModel]


class TopK(NamedTuple):
    """Predictions of a model: its likeliest tokens, and all others as one.

    Attributes
    ----------
    ids : Tensor
        Token ids, (…, K), integers.
    log_probs : Tensor
        Their log-probabilities, (…, K).
    log_rest : Tensor
        Log of the probability of all other tokens, (…); -inf if there is none.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor


def top_k(logits: Tensor, k: int) -> TopK:
    """Reduce logits (…, V) to the `k` likeliest tokens (at most all) and the rest."""
    log_probs = logits.log_softmax(-1)
    kept, ids = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    return TopK(ids, kept, log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1))


def divergence(teacher: TopK, logits: Tensor) -> Tensor:
    """KL divergence from the teacher to a model, with all but the K likeliest tokens as one.

    It is never above the divergence over all tokens, and equal to it for K = V.

    Parameters
    ----------
    teacher : TopK
        The teacher's predictions. They are normalised, because they may be rounded.
    logits : Tensor
        The model's logits, (…, V).

    Returns
    -------
    Tensor
        KL(teacher ‖ model) in nats, (…).
    """
    ids, has_rest = teacher.ids, teacher.ids.shape[-1] < logits.shape[-1]
    log_q = logits.gather(-1, ids)
    log_p = teacher.log_probs
    if has_rest:
        rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q, rest], dim=-1)
        log_p = torch.cat([log_p, teacher.log_rest[..., None]], dim=-1)
    log_q = log_q - logits.logsumexp(-1, keepdim=True)
    p = log_p.softmax(-1)
    return (torch.xlogy(p, p) - p * log_q).sum(-1)


class Predictions(Dataset):
    """Windows of tokens with the teacher's predictions, which are read when they are needed."""

    def __init__(self, windows: Windows, files: list[Any], num_at_once: int) -> None:
        self._windows, self._files, self._num_at_once = windows, files, num_at_once

    def __len__(self) -> int:
        return len(self._windows.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read a window: those of `labelled` (T,), and the fields of `TopK` for P predictions."""
        number, row = divmod(index, self._num_at_once)
        with reading(self._files[number]), safe_open(self._files[number], "pt") as file:
            ids, log_probs, log_rest = (file.get_slice(name)[row] for name in TopK._fields)
        return {
            **labelled(self._windows, index),
            "ids": ids.long(),
            "log_probs": log_probs.float(),
            "log_rest": log_rest.float(),
        }

    @property
    def seconds(self) -> float:
        """How long the teacher has worked, summed over the processes."""
        return sum(float(read_tensor(file, "seconds")) for file in self._files)


def labelled(windows: Windows, index: int) -> dict[str, Tensor]:
    """Select a window: ``input_ids``, and ``labels``, which are `IGNORED` if not learned."""
    tokens_T = windows.tokens[index]
    labels_T = tokens_T.where(windows.is_learned[index], IGNORED)
    labels_T[0] = IGNORED  # nothing predicts it
    return {"input_ids": tokens_T, "labels": labels_T}


def all_learned(windows_NT: Tensor) -> Windows:
    """Windows in which the loss counts every token."""
    return Windows(windows_NT, torch.ones_like(windows_NT, dtype=torch.bool))


def store_predictions(
    run: Run, kind: str, windows: Windows, teacher: Teacher, config: RecoverConfig
) -> Predictions:
    """Store the teacher's predictions for some windows, those that are not stored yet.

    Processes share the files. A file is checked when it is opened; together with the identity of
    the run, that is a check of teacher, tokens and K.

    Parameters
    ----------
    run : Run
        Stores them. All processes call this together.
    kind : str
        What windows these are, in a few words.
    windows : Windows
        The windows.
    teacher : callable
        Loads the dense model, which is not called if all files exist.
    config : RecoverConfig
        Says how many tokens of each prediction are kept, and how many windows are computed at once.

    Raises
    ------
    NumericalError
        If the teacher's logits are not finite.
    RunStateError
        If a file is damaged or cannot be written.
    """
    num_at_once = max(1, FILE_TOKENS // windows.tokens.shape[1])
    parts = windows.tokens.split(num_at_once)
    names = [LOGITS_FILE.format(kind, index) for index in range(len(parts))]
    state = PartialState()
    for index in range(state.process_index, len(parts), state.num_processes):
        if run.has(names[index]):
            continue
        start = time.monotonic()
        tensors = _predict(teacher(), parts[index], config)
        if not index:
            num_bytes = sum(tensor[0, 0].nbytes for tensor in tensors.values())
            log.info("%s: predictions take %d bytes per token", kind, num_bytes)
        tensors["seconds"] = seconds_since(start)
        with run.saving(names[index]) as temporary:
            temporary.write_bytes(save(tensors))
        log.info("%s: the dense model has read part %d of %d", kind, index + 1, len(parts))
    with training_together():
        state.wait_for_everyone()
    return Predictions(windows, [run.saved(name) for name in names], num_at_once)


def seconds_since(start: float) -> Tensor:
    """Seconds since a time of `time.monotonic`, to be stored."""
    return torch.tensor(time.monotonic() - start)


@torch.no_grad()
def _predict(
    teacher: PreTrainedModel, windows_NT: Tensor, config: RecoverConfig
) -> dict[str, Tensor]:
    """Compute the teacher's predictions, in the types in which they are stored."""
    batches = []
    for batch in windows_NT.split(config.micro_batch_size):
        logits = teacher(batch.to(teacher.device), use_cache=False).logits[:, :-1].float()
        if not logits.isfinite().all():
            dtype = str(teacher.dtype).removeprefix("torch.")
            raise NumericalError(
                f"the teacher's logits are not finite in {dtype}",
                hint="give --dtype bfloat16 or float32",
            )
        ids_type = torch.uint16 if logits.shape[-1] <= SMALL_VOCABULARY else torch.int32
        ids, log_probs, log_rest = top_k(logits, config.top_k)
        batches.append((ids.to(ids_type).cpu(), log_probs.half().cpu(), log_rest.half().cpu()))
    return dict(zip(TopK._fields, map(torch.cat, zip(*batches, strict=True)), strict=True))
