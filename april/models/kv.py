"""KV memory of one length class: rows of equal capacity, the occupied ones contiguous in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Keys of one layer that do not fit into a core's own caches are read at the pace of the processor's prefetching, which
# loses its thread at every gap: reading on through unwritten places is faster than skipping them.
_STREAMED_BYTES = 2**20


class KvBucket:
    """Keys and values of up to `rows` sequences of at most `capacity` tokens.

    `data` is (layers, 2, rows, H_kv, capacity, d). Row r holds the tokens of the r-th occupant; `write` and `attend` work on
    the first `size` rows at once, so finished sequences cost nothing. Unwritten places of occupied rows are masked, and
    always finite.

    Args:
        num_layers, num_kv_heads, head_dim: sizes of the model.
        capacity: tokens a row can hold.
        dtype, device: of the memory.
        clears: whether unwritten places are made zero; whoever never reads them can do without.

    Attributes:
        generation: changes whenever the memory moves.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        clears: bool = True,
    ) -> None:
        self._clears = clears
        self.num_layers, self.num_kv_heads, self.head_dim, self.capacity = num_layers, num_kv_heads, head_dim, capacity
        self.dtype, self.device = dtype, device
        self.size = self.rows = self.longest = self.generation = 0
        # Small CPU products are faster as plain batched matrix products; elsewhere the fused kernel wins.
        self.fused = device.type != "cpu" or dtype not in (torch.float32, torch.float64)
        self.resize(0)

    def resize(self, rows: int) -> None:
        """Allocate memory for so many rows (at least the occupied ones) and keep what is there."""
        shape = (self.num_layers, 2, rows, self.num_kv_heads, self.capacity, self.head_dim)
        data = torch.empty(shape, dtype=self.dtype, device=self.device)
        if self.size:
            data[:, :, : self.size] = self.data[:, :, : self.size]
        self._mask = torch.empty((rows, self.num_kv_heads, self.capacity), dtype=self.dtype, device=self.device)
        self.data, self.rows = data, rows
        self.generation += 1

    def insert(self, source: torch.Tensor | None, length: int) -> int:
        """Occupy the next allocated row with `length` tokens of KV (layers, 2, H_kv, length, d); returns the row."""
        row = self.size
        self.size += 1
        known = length if source is not None else 0
        if source is not None and length:
            self.data[:, :, row, :, :length] = source
        if self._clears:
            self.data[:, :, row, :, known:].zero_()
        return row

    def insert_rows(self, source: torch.Tensor, lengths: list[int]) -> int:
        """Occupy the next allocated rows at once.

        Args:
            source: (layers, 2, n, H_kv, T, d), at least as many tokens as the longest row has.
            lengths: tokens of each row.

        Returns:
            The first of the rows.
        """
        first, longest = self.size, max(lengths)
        self.size += len(lengths)
        self.data[:, :, first : self.size, :, :longest] = source[..., :longest, :]
        if self._clears:
            self.data[:, :, first : self.size, :, longest:].zero_()
        return first

    def remove(self, row: int, last_length: int) -> None:
        """Free a row; the last row, which holds `last_length` tokens, moves into the hole."""
        last = self.size - 1
        if row != last:
            self.data[:, :, row, :, :last_length] = self.data[:, :, last, :, :last_length]
        self.size = last

    def read(self, row: int, length: int) -> torch.Tensor:
        """A view of a row's first tokens, (layers, 2, H_kv, length, d)."""
        return self.data[:, :, row, :, :length]

    def set_lengths(self, lengths: list[int]) -> None:
        """Say how many tokens each occupied row holds; needed after any change of rows, before `begin_step`."""
        heads = self.size * self.num_kv_heads
        hidden = torch.arange(self.capacity)[None] >= torch.tensor(lengths, dtype=torch.int64)[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
        self._mask[: self.size] = mask.to(self.device).unsqueeze(1)
        length = torch.tensor(lengths, dtype=torch.int64).repeat_interleave(self.num_kv_heads)
        # The place of the last token; `begin_step` moves it to the next one. Values lie behind all keys.
        key_place = torch.arange(heads) * self.capacity + length - 1
        self._mask_index = key_place.to(self.device)
        value_place = key_place + self.rows * self.num_kv_heads * self.capacity
        both = torch.stack((key_place, value_place)).view(2, self.size, -1).transpose(0, 1)
        self._index = both.reshape(-1).to(self.device)
        self.longest = max(lengths, default=0)
        flat = self.data.view(self.num_layers, 2, -1, self.capacity, self.head_dim)[:, :, :heads]
        self._places = [self.data[layer].view(-1, self.head_dim) for layer in range(self.num_layers)]
        self._keys = [flat[layer, 0].transpose(1, 2) for layer in range(self.num_layers)]
        self._values = [flat[layer, 1] for layer in range(self.num_layers)]
        self._mask_places, self._mask_rows = self._mask.view(-1), self._mask.view(-1, 1, self.capacity)[:heads]

    def begin_step(self) -> None:
        """Open the next place of every occupied row."""
        self._index += 1
        self._mask_index += 1
        self.longest += 1
        self._mask_places.index_fill_(0, self._mask_index, 0.0)
        self._width = self._read_tokens()
        self._step_mask = self._mask_rows[:, :, : self._width]

    def _read_tokens(self) -> int:
        """Places of a row that attention reads; those behind the row's tokens are masked."""
        key_bytes = self.size * self.num_kv_heads * self.capacity * self.head_dim * self.dtype.itemsize
        return self.capacity if 2 * self.longest >= self.capacity and key_bytes >= _STREAMED_BYTES else self.longest

    def write(self, layer: int, key_value: torch.Tensor) -> None:
        """Store the new token's keys and values of one layer, (size, 2 * H_kv, d): all key heads, then all value heads."""
        self._places[layer].index_copy_(0, self._index, key_value.reshape(-1, self.head_dim))

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the occupied rows, each (size, H_kv, longest, d), without copying."""
        data = self.data[layer, :, : self.size, :, : self.longest]
        return data[0], data[1]

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """One new query per row, (size, H, d) -> (size, H * d); queries that share a KV head form the query axis."""
        if self.fused:
            return self._attend_fused(layer, query, scale)
        grouped = query.reshape(self.size * self.num_kv_heads, -1, self.head_dim)
        keys = self._keys[layer].narrow(2, 0, self._width)
        weights = torch.baddbmm(self._step_mask, grouped, keys, alpha=scale).softmax(-1)
        return torch.bmm(weights, self._values[layer].narrow(1, 0, self._width)).view(self.size, -1)

    def additive_mask(self) -> torch.Tensor:
        """(size, 1, 1, longest): 0 where a row has a token, -inf elsewhere."""
        return self._mask[: self.size, :1, : self.longest].unsqueeze(1)

    def _attend_fused(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        key, value = self.views(layer)
        grouped = query.reshape(self.size, self.num_kv_heads, -1, self.head_dim)
        mask = self.additive_mask()
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale).reshape(self.size, -1)
