"""Packed and plain weights give the same products."""

from __future__ import annotations

import pytest
import torch

from april.models.lean_decode import LeanDecoder
from april.models.linear import FrozenLinear
from april.testing.toy_model import toy_model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(
    ("dtype", "shape", "tolerance"),
    [
        (torch.float32, (512, 256), 1e-4),
        (torch.float32, (8, 4), 1e-6),
        (torch.float64, (512, 256), 1e-12),
        (torch.bfloat16, (512, 256), 0.3),
    ],
)
def test_a_frozen_layer_is_a_linear_layer(
    dtype: torch.dtype, shape: tuple[int, int], tolerance: float, rows: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, residual, shift = (
        torch.randn(size, generator=generator).to(dtype) for size in (shape, (rows, shape[1]), (rows, shape[0]), shape[:1])
    )
    layer = FrozenLinear(weight, shift if bias else None)
    expected = torch.nn.functional.linear(x, weight, shift if bias else None)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(layer.added_to(residual, x), expected + residual, rtol=0, atol=tolerance)


def test_large_layers_equal_the_module() -> None:
    module = toy_model("qwen3", hidden_size=256, vocab_size=600, num_heads=8, num_kv_heads=4, spread=1.0)
    decoder = LeanDecoder.from_module(module)
    assert decoder is not None
    ids = torch.arange(2, 60)
    logits = decoder.logits(decoder.prefill(ids, [58]), 0, 0, 58)
    torch.testing.assert_close(logits, module(ids[None]).logits[0].detach(), rtol=0, atol=1e-4, check_device=False)
