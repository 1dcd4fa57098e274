"""Linear layers for inference whose float32 weights are stored as the CPU's matrix product reads them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_LEAST_PACKED_ELEMENTS = 2**17
_PACKED_ROWS = 32


class FrozenLinear:
    """x W^T + b on a weight of its own.

    In float32 on a CPU (and bfloat16, where it has the instructions) large weights are kept in the blocked layout of oneDNN
    only: a product of few rows then streams the weight once, in order, instead of gathering it. Small ones stay as they
    are, since for them the call itself costs most.

    Args:
        weight: (out, in); becomes the layer's own.
        bias: (out,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._packed = _pack(weight)
        self._weight = weight if self._packed is None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) -> (rows, out)."""
        if self._packed is None:
            return F.linear(x, self._weight, self._bias)  # type: ignore[arg-type]
        found: torch.Tensor = _operator()(x, self._packed, self._bias, "none", [], "")
        return found

    def take(self, other: FrozenLinear) -> None:
        """The numbers of a layer of the same shape; unless they are packed, they are copied to where the present ones are."""
        if self._weight is None or other._weight is None:
            self._packed, self._weight, self._bias = other._packed, other._weight, other._bias
            return
        self._weight.copy_(other._weight)
        if self._bias is not None and other._bias is not None:
            self._bias.copy_(other._bias)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + x W^T + b."""
        if self._packed is not None:
            found: torch.Tensor = _operator().binary(x, residual, self._packed, self._bias, "add")
            return found
        out = torch.addmm(residual, x, self._weight.t())  # type: ignore[union-attr]
        return out if self._bias is None else out.add_(self._bias)


def _operator() -> Any:
    return torch.ops.mkldnn._linear_pointwise


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in blocked layout, or None where that does not pay or this build of torch cannot."""
    if weight.device.type != "cpu" or weight.numel() < _LEAST_PACKED_ELEMENTS or not torch.backends.mkldnn.is_available():
        return None
    try:
        if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
        _operator().binary(weight[:1], weight.new_zeros(1, len(weight)), packed, None, "add")
    except (RuntimeError, AttributeError):
        return None  # the operators are torch's own and may change; the plain product is always there
    return packed
