"""One decode step over the rows of all buckets at once, by the compiled kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from april.models.kernel import Kernel, Step
from april.models.kv import KvBucket


class KvRows:
    """Stands in for the buckets in a forward pass: a row is as long as its own tokens, whatever its bucket.

    Args:
        kernel: of the model's shape.
        buckets: float32, in CPU memory; their occupied rows step. Their memory must not move while this is used.
        lengths: (size,), tokens of each row before the step, in the order of the buckets.

    Attributes:
        size: rows.
        longest: tokens of the longest row.
    """

    def __init__(self, kernel: Kernel, buckets: Sequence[KvBucket], lengths: npt.NDArray[np.int64]) -> None:
        self.size, self.longest = len(lengths), int(lengths.max(initial=0))
        self._kernel, self._num_kv_heads, self._head_dim = kernel, buckets[0].num_kv_heads, buckets[0].head_dim
        self._data = [bucket.data for bucket in buckets]  # the addresses below are theirs
        self._lengths = lengths.astype(np.int64)  # a copy
        self._places = np.concatenate([_places(bucket) for bucket in buckets], axis=1)
        self._step = Step(num_rows=self.size, num_kv_heads=self._num_kv_heads, length=self._lengths.ctypes.data)
        for name, row in zip(("keys", "layer_stride", "value_stride", "head_stride"), self._places, strict=True):
            setattr(self._step, name, row.ctypes.data)

    def begin_step(self) -> None:
        """Open the next place of every row."""
        self._lengths += 1
        self.longest += 1

    def set_model(self, phases: torch.Tensor, eps: float, scale: float) -> None:
        """What `attend` needs besides.

        Args:
            phases: complex64 (positions, 1, d / 2), at least as many as the longest row has tokens.
            eps: of the norms.
            scale: of the products of queries and keys.
        """
        self._phases = phases
        self._step.phases, self._step.eps, self._step.scale = phases.data_ptr(), eps, scale
        self._step.num_threads = torch.get_num_threads()

    def attend(self, layer: int, heads: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """Norm and rotate the new token's heads, store its keys and values, and attend.

        Args:
            layer: which one.
            heads: (size, (H + 2 H_kv) * d), as projected: queries, keys, values.
            norm: (H + H_kv, d), weights of the norms of queries and keys.

        Returns:
            (size, H * d).
        """
        num_queries = heads.shape[1] // self._head_dim - 2 * self._num_kv_heads
        out = heads.new_empty(self.size, num_queries * self._head_dim)
        weights = 0 if norm is None else norm.data_ptr()
        self._kernel.decode_attention(ctypes.byref(self._step), layer, heads.data_ptr(), weights, out.data_ptr())
        return out

    def gated(self, both: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of (size, 2 * n), gates first."""
        out = both.new_empty(len(both), both.shape[1] // 2)
        self._kernel.gated(both.data_ptr(), *out.shape, torch.get_num_threads(), out.data_ptr())
        return out

    def rms_normed(self, x: torch.Tensor) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) over the last axis of (size, n)."""
        out = torch.empty_like(x)
        self._kernel.rms_normed(x.data_ptr(), *x.shape, self._step.eps, torch.get_num_threads(), out.data_ptr())
        return out


def _places(bucket: KvBucket) -> npt.NDArray[np.int64]:
    """(4, rows): address of a row's keys in the first layer, and strides of layers, values and heads."""
    layer, value, row, head = bucket.data.stride()[:4]
    rows = np.arange(bucket.size, dtype=np.int64)
    address = bucket.data.data_ptr() + rows * (row * bucket.dtype.itemsize)
    return np.stack([address, *(np.full_like(rows, stride) for stride in (layer, value, head))])
