"""The recipe of docs/serving.md for ONNX."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.parametrize("variant", ["llama", "qwen2-sliding", "qwen3"])
def test_onnxruntime_agrees_with_torch(
    variant: str, slim_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(slim_checkpoint(variant)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        model,
        (torch.ones(2, 16, dtype=torch.long),),
        kwargs={"use_cache": False},
        dynamic_shapes={"input_ids": {0: dynamic, 1: dynamic}, "use_cache": None},
        output_names=["logits"],
        dynamo=True,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((1, 7), (3, 33)):
        tokens = torch.randint(2, 320, shape, generator=torch.Generator().manual_seed(1))
        (logits,) = session.run(["logits"], {"input_ids": tokens.numpy()})
        expected = model(tokens).logits.detach()
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
