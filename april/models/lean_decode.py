"""The lean forward for inference: fused copies of the weights, refreshed in place, decoding over KV buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from april.core.errors import ModelError
from april.models.attention import PackedLayout, packed_causal_attention, packed_layout
from april.models.kv import KvBucket
from april.models.kv_draft import DraftStep
from april.models.kv_rows import KvRows
from april.models.kv_static import StaticRows
from april.models.lean import LeanShape, lean_shape, rms_norm, rms_normed
from april.models.linear import FrozenLinear
from april.models.parameters import Shapes, check_weights, parameter_shapes

_HEAD = "lm_head.weight"


@dataclass
class _Layer:
    """Fused weights of one decoder layer; heads of queries and keys have their rotary pairs interleaved.

    The weights of a norm are None where they are multiplied into the projection behind it.
    """

    input_norm: torch.Tensor | None
    qkv: FrozenLinear
    qk_norm: torch.Tensor | None
    out: FrozenLinear
    mlp_norm: torch.Tensor | None
    gate_up: FrozenLinear
    down: FrozenLinear


class LeanDecoder:
    """Prefill, decode and hidden states of a supported causal LM on weights of its own.

    Rotary pairs (i, i + d / 2) are stored as neighbours (2 i, 2 i + 1), so that rotation is one complex product; the
    same permutation on queries and keys leaves their dot products unchanged.

    Attributes:
        shape: sizes.
        dtype, device: of the weights and of KV memory.
    """

    def __init__(
        self, shape: LeanShape, parameters: Shapes, inv_freq: torch.Tensor, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._parameters = {**parameters, _HEAD: (shape.vocab_size, shape.hidden_size)}
        self._inv_freq = inv_freq.detach().float().cpu().clone()
        self._phases = torch.zeros(0, 1, shape.head_dim // 2, device=device)
        self._layers: list[_Layer] = []
        self._fixed = False
        half = shape.head_dim // 2
        self._pairs = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1).reshape(-1).to(device)
        # The float32 mean inside a norm depends on the order of its terms; in float64 that is the only rounding one can
        # see, so pairs are interleaved behind the norm and the result equals `transformers` to the last digits.
        self._interleave_late = dtype == torch.float64

    @classmethod
    def from_module(cls, module: Any, dtype: torch.dtype | None = None) -> LeanDecoder | None:
        """A decoder with a copy of the module's weights, or None when the model is not supported."""
        shape = lean_shape(module)
        if shape is None:
            return None
        weight = module.model.embed_tokens.weight
        inv_freq = module.model.rotary_emb.inv_freq
        decoder = cls(shape, parameter_shapes(module), inv_freq, dtype or weight.dtype, weight.device)
        decoder.load(dict(module.named_parameters()))
        return decoder

    def check(self, weights: Mapping[str, Any]) -> None:
        """Refuse weights that `load` could not take.

        Raises:
            ModelError: a parameter is missing or has another shape.
        """
        check_weights(weights, self._parameters, optional=(_HEAD,))

    @torch.no_grad()
    def load(self, weights: Mapping[str, Any]) -> None:
        """Copy weights given by their Hugging Face names; without `lm_head.weight` the embeddings are the head.

        Raises:
            ModelError: when a parameter is missing or has another shape; nothing has changed then.
        """
        self.check(weights)
        # Each tensor is copied, so that later changes of the caller's weights are never seen.
        layers = [self._fuse(weights, index) for index in range(self.shape.num_layers)]
        embed = self._take(weights, "model.embed_tokens.weight")
        head = self._take(weights, _HEAD) if _HEAD in weights else embed
        norm = self._take(weights, "model.norm.weight")
        if self._fixed:
            self._take_in_place(layers, embed, FrozenLinear(head), norm)
            return
        self._layers, self._embed, self._head, self._norm = layers, embed, FrozenLinear(head), norm

    @torch.no_grad()
    def fix_addresses(self, longest: int) -> None:
        """From now on `load` copies into the tensors that hold the weights (packed ones excepted), and positions below
        `longest` need no new table, so that a captured step stays good."""
        self._fixed = True
        self._phase(torch.zeros(1, dtype=torch.int64, device=self.device), longest)

    def _take_in_place(self, layers: list[_Layer], embed: torch.Tensor, head: FrozenLinear, norm: torch.Tensor) -> None:
        for old, new in zip(self._layers, layers, strict=True):
            for field in fields(_Layer):
                _take(getattr(old, field.name), getattr(new, field.name))
        _take(self._embed, embed)
        _take(self._head, head)
        _take(self._norm, norm)

    def _take(self, weights: Mapping[str, Any], name: str) -> torch.Tensor:
        return weights[name].detach().to(device=self.device, dtype=self.dtype, copy=True).contiguous()

    def _joined(self, weights: Mapping[str, Any], names: Sequence[str]) -> torch.Tensor | None:
        present = [name in weights for name in names]
        if not any(present):
            return None
        return torch.cat([self._take(weights, name) for name in names])

    def _fuse(self, weights: Mapping[str, Any], index: int) -> _Layer:
        prefix = f"model.layers.{index}."

        def take(name: str) -> torch.Tensor:
            return self._take(weights, prefix + name)

        def bias(*parts: str) -> torch.Tensor | None:
            return self._joined(weights, [f"{prefix}{part}.bias" for part in parts])

        attention = [f"self_attn.{name}_proj" for name in "qkv"]
        qkv = torch.cat([take(f"{name}.weight") for name in attention])
        qkv_bias = bias(*attention)
        shape = self.shape
        norms = [
            self._interleaved_norm(take(f"self_attn.{name}_norm.weight")).expand(count, -1)
            for name, count in (("q", shape.num_heads), ("k", shape.num_kv_heads))
            if shape.qk_norm
        ]
        gate_up = torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")])
        input_norm, mlp_norm = take("input_layernorm.weight"), take("post_attention_layernorm.weight")
        folds = self.dtype in (torch.float32, torch.float64)  # in fewer bits the product would be rounded once more
        if folds:
            qkv, gate_up = qkv.mul_(input_norm), gate_up.mul_(mlp_norm)
        return _Layer(
            input_norm=None if folds else input_norm,
            qkv=FrozenLinear(self._interleaved(qkv), None if qkv_bias is None else self._interleaved(qkv_bias)),
            qk_norm=torch.cat(norms) if norms else None,
            out=FrozenLinear(take("self_attn.o_proj.weight"), bias("self_attn.o_proj")),
            mlp_norm=None if folds else mlp_norm,
            gate_up=FrozenLinear(gate_up, bias("mlp.gate_proj", "mlp.up_proj")),
            down=FrozenLinear(take("mlp.down_proj.weight"), bias("mlp.down_proj")),
        )

    def _interleaved_norm(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self._interleave_late else weight[self._pairs]

    def _interleaved(self, qkv: torch.Tensor) -> torch.Tensor:
        if self._interleave_late:
            return qkv
        heads = qkv.view(-1, self.shape.head_dim, *qkv.shape[1:]).clone()
        rotated = self.shape.num_heads + self.shape.num_kv_heads
        heads[:rotated] = heads[:rotated][:, self._pairs]
        return heads.reshape(qkv.shape)

    def _phase(self, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """exp(i angle) for each position, (n, 1, d / 2) complex; angles in float32 as in training."""
        return self._phases_to(longest).index_select(0, positions)

    def _phases_to(self, longest: int) -> torch.Tensor:
        """The table of at least so many positions."""
        if longest > len(self._phases):
            size = max(longest, 2 * len(self._phases), 256)
            angle = torch.arange(size)[:, None].float() * self._inv_freq[None]
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            cos, sin = (table.to(self.dtype).to(wide) for table in (angle.cos(), angle.sin()))
            self._phases = torch.complex(cos, sin).unsqueeze(1).to(self.device)
        return self._phases

    def _heads(self, layer: _Layer, x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        """(n, H + 2 H_kv, d): rotated queries, rotated keys, values."""
        shape = self.shape
        rotated = shape.num_heads + shape.num_kv_heads
        hidden = _normed(x, layer.input_norm, shape.rms_eps)
        heads = layer.qkv(hidden).view(-1, rotated + shape.num_kv_heads, shape.head_dim)
        qk = heads[:, :rotated]
        if layer.qk_norm is not None:
            torch.mul(_normed(qk, None, shape.rms_eps), layer.qk_norm, out=qk)
        if self._interleave_late:
            qk.copy_(qk.index_select(-1, self._pairs))
        if phase.dtype.to_real() == qk.dtype:
            torch.view_as_complex(qk.view(-1, rotated, shape.head_dim // 2, 2)).mul_(phase)
        else:
            pairs = torch.view_as_complex(qk.float().view(-1, rotated, shape.head_dim // 2, 2))
            qk.copy_(torch.view_as_real(pairs * phase).flatten(-2))
        return heads

    def _finish(self, layer: _Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The residual stream after the attention output and the gated unit."""
        x = layer.out.added_to(x, attended)
        hidden = _normed(x, layer.mlp_norm, self.shape.rms_eps)
        gate, up = layer.gate_up(hidden).chunk(2, dim=-1)
        return layer.down.added_to(x, F.silu(gate).mul_(up))

    @torch.inference_mode()
    def decode(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
        buckets: Sequence[KvBucket | DraftStep | StaticRows | KvRows],
    ) -> torch.Tensor:
        """One step: write the KV of n new tokens and return the logits that follow them.

        Args:
            token_ids, positions: int64 (n,), in the order of the buckets' rows.
            longest: largest position plus one.
            buckets: occupied buckets, each with its step begun, or what stands in for them; `KvRows` stands for all of them.

        Returns:
            (n, V).
        """
        x = self._embed.index_select(0, token_ids)
        if isinstance(buckets[0], KvRows):
            return self._decode_rows(x, longest, buckets[0])
        phase = self._phase(positions, longest)
        scale, num_heads, sizes = self.shape.head_dim**-0.5, self.shape.num_heads, [bucket.size for bucket in buckets]
        for index, layer in enumerate(self._layers):
            heads = self._heads(layer, x, phase)
            parts = heads.split(sizes) if len(buckets) > 1 else (heads,)
            outputs = []
            for bucket, part in zip(buckets, parts, strict=True):
                bucket.write(index, part[:, num_heads:])
                outputs.append(bucket.attend(index, part[:, :num_heads], scale))
            x = self._finish(layer, x, outputs[0] if len(outputs) == 1 else torch.cat(outputs))
        return self._head(rms_norm(x, self._norm, self.shape.rms_eps))

    def _decode_rows(self, x: torch.Tensor, longest: int, rows: KvRows) -> torch.Tensor:
        eps = self.shape.rms_eps
        rows.set_model(self._phases_to(longest), eps, self.shape.head_dim**-0.5)
        for index, layer in enumerate(self._layers):
            x = layer.out.added_to(x, rows.attend(index, layer.qkv(rows.rms_normed(x)), layer.qk_norm))
            x = layer.down.added_to(x, rows.gated(layer.gate_up(rows.rms_normed(x))))
        return self._head(rms_norm(x, self._norm, eps))

    @torch.inference_mode()
    def prefill(self, token_ids: torch.Tensor, lengths: Sequence[int], *, keep_kv: bool = True) -> PackedStates:
        """Run packed sequences (M,) and return their hidden states, and their KV when asked."""
        layout = packed_layout(lengths, self.device)
        sorted_ids = token_ids if layout.order is None else token_ids.index_select(0, layout.order)
        x = self._embed.index_select(0, sorted_ids)
        phase = self._phase(layout.positions, max(lengths))
        kept: list[torch.Tensor] = []
        sizes = [self.shape.num_heads, self.shape.num_kv_heads, self.shape.num_kv_heads]
        for layer in self._layers:
            heads = self._heads(layer, x, phase)
            query, key, value = heads.split(sizes, dim=1)
            if keep_kv:
                kept.append(torch.stack((key, value)))
            x = self._finish(layer, x, packed_causal_attention(query, key, value, layout))
        return PackedStates(layout, tuple(lengths), x, torch.stack(kept) if kept else None)

    @torch.inference_mode()
    def logits(self, states: PackedStates, index: int, start: int, end: int) -> torch.Tensor:
        """Logits (end - start, V) that follow the tokens [start, end) of one packed sequence."""
        first = states.layout.starts[index]
        hidden = rms_norm(states.stream[first + start : first + end], self._norm, self.shape.rms_eps)
        return self._head(hidden)


@dataclass(frozen=True)
class PackedStates:
    """What a packed forward leaves behind.

    Attributes:
        layout: order of the rows.
        lengths: tokens of each sequence.
        stream: (M, D), before the final norm, in the order of `layout`.
        kv: (layers, 2, M, H_kv, d) or None.
    """

    layout: PackedLayout
    lengths: tuple[int, ...]
    stream: torch.Tensor
    kv: torch.Tensor | None

    def kv_of(self, index: int) -> torch.Tensor:
        """KV of one sequence as a bucket wants it, (layers, 2, H_kv, T, d)."""
        if self.kv is None:
            raise ModelError("this forward kept no KV", expected="keep_kv=True")
        start = self.layout.starts[index]
        return self.kv[:, :, start : start + self.lengths[index]].transpose(2, 3)


def _take(old: FrozenLinear | torch.Tensor | None, new: Any) -> None:
    if isinstance(old, FrozenLinear):
        old.take(new)
    elif old is not None:
        old.copy_(new)


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return rms_normed(x, eps) if weight is None else rms_norm(x, weight, eps)
