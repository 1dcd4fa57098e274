"""One decode step in which a row of a bucket may feed several tokens: the last one and guesses of what follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from april.models.kv import KvBucket


class DraftStep:
    """Stands in for a bucket during one forward pass; a row's tokens see the row up to themselves.

    The rows' tokens are packed behind each other. KV of all of them is written; how much of it stays is said afterwards by
    the bucket's next `set_lengths`.

    Args:
        bucket: whose occupied rows step.
        lengths: int64 (rows,), tokens each row holds before the step.
        counts: int64 (rows,), tokens each row feeds, at least 1; they fit into the row.

    Attributes:
        size: packed tokens.
        longest: tokens of the longest row after the step.
    """

    def __init__(self, bucket: KvBucket, lengths: torch.Tensor, counts: torch.Tensor) -> None:
        self._bucket = bucket
        device, heads, capacity = bucket.device, bucket.num_kv_heads, bucket.capacity
        self.size, self._width = int(counts.sum()), int(counts.max())
        self.longest = int((lengths + counts).max())
        row = torch.repeat_interleave(torch.arange(bucket.size), counts)
        begin = torch.cumsum(counts, 0) - counts
        offset = torch.arange(self.size) - begin[row]
        place = ((row * heads)[:, None] + torch.arange(heads)) * capacity + (lengths[row] + offset)[:, None]
        values = place + bucket.rows * heads * capacity
        self._index = torch.stack((place, values), dim=1).reshape(-1).to(device)
        # Rows that feed fewer tokens repeat their last one in the rectangle of queries.
        column = torch.minimum(torch.arange(self._width)[None], counts[:, None] - 1)
        self._pad_index = (begin[:, None] + column).reshape(-1).to(device)
        self._keep_index = (row * self._width + offset).to(device)
        hidden = torch.arange(self.longest)[None, None] > (lengths[:, None] + column)[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=bucket.dtype).masked_fill_(hidden, float("-inf"))
        self._mask = mask.to(device)
        self._wide_mask: torch.Tensor | None = None

    def write(self, layer: int, key_value: torch.Tensor) -> None:
        """Store keys and values of one layer, (size, 2 * H_kv, d): all key heads, then all value heads."""
        bucket = self._bucket
        bucket.data[layer].view(-1, bucket.head_dim).index_copy_(0, self._index, key_value.reshape(-1, bucket.head_dim))

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention of the packed queries, (size, H, d) -> (size, H * d)."""
        bucket, width = self._bucket, self._width
        rows, heads, size = bucket.size, bucket.num_kv_heads, bucket.head_dim
        groups = query.shape[1] // heads
        rectangle = query.index_select(0, self._pad_index).view(rows, width, heads, groups, size)
        grouped = rectangle.transpose(1, 2).reshape(rows, heads, width * groups, size)
        key, value = bucket.data[layer, :, :rows, :, : self.longest]
        if bucket.fused:
            mask = self._mask[:, :, None].expand(-1, -1, groups, -1).reshape(rows, 1, width * groups, -1)
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        else:
            weights = torch.baddbmm(
                self._bias(groups), grouped.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale
            ).softmax(-1)
            out = torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, width * groups, size)
        out = out.view(rows, heads, width, groups, size).transpose(1, 2).reshape(rows * width, -1)
        return out.index_select(0, self._keep_index)

    def _bias(self, groups: int) -> torch.Tensor:
        """(rows * H_kv, width * groups, longest); the same for all layers."""
        if self._wide_mask is None:
            shape = (-1, self._bucket.num_kv_heads, -1, groups, -1)
            self._wide_mask = self._mask[:, None, :, None].expand(*shape).flatten(2, 3).flatten(0, 1)
        return self._wide_mask
