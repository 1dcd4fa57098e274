"""The first rows of a bucket in one decode step whose every shape and address is known beforehand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from april.models.kv import KvBucket


class StaticRows:
    """Stands in for a bucket in a forward pass that is the same work for any content: what a captured graph needs.

    Attention reads rows to their capacity and masks what is not written. Rows behind the occupied ones are padding: they write
    to their first place, which the next occupant of the row overwrites before it is ever seen.

    Args:
        bucket: whose first rows step.
        rows: occupied ones and padding together; at most the allocated rows.

    Attributes:
        bucket: the one given.
        generation: of its memory; with another one these rows are no longer there.
        size: `rows`.
    """

    def __init__(self, bucket: KvBucket, rows: int) -> None:
        self.bucket, self.generation, self.size = bucket, bucket.generation, rows
        heads, capacity, device = bucket.num_kv_heads, bucket.capacity, bucket.device
        first = (torch.arange(rows * heads) * capacity).view(rows, 1, heads)
        # Values lie behind all keys of the layer.
        self._first_places = torch.cat((first, first + bucket.rows * heads * capacity), dim=1).view(rows, -1).to(device)
        self._columns = torch.arange(capacity, device=device)
        bucket.data[:, :, bucket.size : rows].zero_()  # what was never written may be anything

    @property
    def is_current(self) -> bool:
        """Whether the memory is still where it was."""
        return self.bucket.generation == self.generation

    def begin_step(self, positions: torch.Tensor) -> None:
        """Say at which place, int64 (rows,), each row writes; it sees itself and everything before."""
        self._index = (self._first_places + positions[:, None]).view(-1)
        hidden = self._columns[None] > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.bucket.dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        if self.bucket.fused:
            self._mask = mask[:, None, None]
        else:
            self._mask = mask.repeat_interleave(self.bucket.num_kv_heads, dim=0).unsqueeze(1)

    def write(self, layer: int, key_value: torch.Tensor) -> None:
        """Store keys and values of one layer, (size, 2 * H_kv, d): all key heads, then all value heads."""
        size = self.bucket.head_dim
        self.bucket.data[layer].view(-1, size).index_copy_(0, self._index, key_value.reshape(-1, size))

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """One new query per row, (size, H, d) -> (size, H * d)."""
        key, value = self.bucket.data[layer, :, : self.size]
        grouped = query.reshape(self.size, self.bucket.num_kv_heads, -1, self.bucket.head_dim)
        if self.bucket.fused:
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self._mask, scale=scale)
            return out.reshape(self.size, -1)
        weights = torch.baddbmm(self._mask, grouped.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale).softmax(-1)
        return torch.bmm(weights, value.flatten(0, 1)).view(self.size, -1)
