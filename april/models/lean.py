"""A lean forward pass for the shapes of Qwen3, Qwen2 and Llama, on a Hugging Face module's own parameters.

One decoder layer, with x the residual stream of M packed rows:

    h = rms_norm(x);  q, k, v = W_q h, W_k h, W_v h;  (q, k = rms_norm per head, Qwen3);  q, k = rotate(q, k)
    x = x + W_o attention(q, k, v);  x = x + W_down (silu(W_gate h') * W_up h'),  h' = rms_norm(x)

RMSNorm: Zhang and Sennrich 2019; rotary positions: Su et al. 2021; grouped queries: Ainslie et al. 2023; gated units:
Shazeer 2020. The numerics are those of `transformers`: norms are computed in float32 and rotary angles in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from april.models.attention import PackedLayout, packed_causal_attention, packed_layout, shared_prefixes

_MODEL_TYPES = ("qwen3", "qwen2", "llama")


@dataclass(frozen=True)
class LeanShape:
    """Sizes and constants of a supported model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    mlp_size: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    qk_norm: bool


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean is taken in float32, as `transformers` does."""
    if x.dtype == torch.float32:
        return torch.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x.to(torch.float32)
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def rms_normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) for inference: in float32 in half the passes of the composite operator of torch."""
    if x.dtype != torch.float32:
        return rms_norm(x, None, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(x.new_full((1,), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def rotary_tables(inv_freq: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (M, 1, d / 2), of position times inverse frequency; angles in float32."""
    angle = positions[:, None].float() * inv_freq.float()[None]
    return angle.cos().to(dtype).unsqueeze(1), angle.sin().to(dtype).unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + d / 2) of the last axis of (M, H, d)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class LeanModel:
    """The differentiable packed forward; gradients reach the module's own parameters.

    Attributes:
        shape: sizes.
        module: the Hugging Face causal LM whose parameters are used.
    """

    def __init__(self, module: Any, shape: LeanShape) -> None:
        self.module, self.shape = module, shape
        self._body = module.model

    @classmethod
    def from_module(cls, module: Any) -> LeanModel | None:
        """The lean form of this causal LM, or None when it has a shape or an option that is not supported."""
        shape = lean_shape(module, adapters=True)
        return None if shape is None else cls(module, shape)

    def packed_hidden(
        self,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        *,
        gradient_checkpointing: bool = False,
        prefixes: Sequence[tuple[int, int]] = (),
    ) -> torch.Tensor:
        """Final hidden states of S sequences packed without padding; positions restart in each sequence.

        Args:
            token_ids: int64 (M,).
            lengths: tokens of each sequence; they sum to M.
            gradient_checkpointing: recompute each layer in the backward pass.
            prefixes: for each sequence the number of its first tokens' common prefix and their length; such tokens are
                computed once.

        Returns:
            (M, D), after the final norm, in the order of `token_ids`.
        """
        layout = packed_layout(lengths, token_ids.device)
        layout = shared_prefixes(layout, lengths, prefixes) if prefixes else layout
        sorted_ids = token_ids if layout.order is None else token_ids.index_select(0, layout.order)
        sorted_ids = sorted_ids if layout.keep is None else sorted_ids.index_select(0, layout.keep)
        x = F.embedding(sorted_ids, self._body.embed_tokens.weight, self._body.embed_tokens.padding_idx)
        tables = rotary_tables(self._body.rotary_emb.inv_freq, layout.positions, x.dtype)
        for layer in self._body.layers:
            if gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, tables, layout, use_reentrant=False)
            else:
                x = self._layer(layer, x, tables, layout)
        hidden = rms_norm(x, self._body.norm.weight, self.shape.rms_eps)
        back = layout.inverse if layout.expand is None else layout.expand
        if layout.expand is not None and layout.inverse is not None:
            back = layout.expand.index_select(0, layout.inverse)
        return hidden if back is None else hidden.index_select(0, back)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, D) -> (rows, V) in the module's dtype."""
        return F.linear(hidden, self.module.lm_head.weight)

    def _layer(
        self, layer: Any, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], layout: PackedLayout
    ) -> torch.Tensor:
        shape, attention, mlp = self.shape, layer.self_attn, layer.mlp
        h = rms_norm(x, layer.input_layernorm.weight, shape.rms_eps)
        q = attention.q_proj(h).view(-1, shape.num_heads, shape.head_dim)
        k = attention.k_proj(h).view(-1, shape.num_kv_heads, shape.head_dim)
        v = attention.v_proj(h).view(-1, shape.num_kv_heads, shape.head_dim)
        if shape.qk_norm:
            q = rms_norm(q, attention.q_norm.weight, shape.rms_eps)
            k = rms_norm(k, attention.k_norm.weight, shape.rms_eps)
        x = x + attention.o_proj(packed_causal_attention(rotate(q, *tables), rotate(k, *tables), v, layout))
        h = rms_norm(x, layer.post_attention_layernorm.weight, shape.rms_eps)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def lean_shape(module: Any, *, adapters: bool = False) -> LeanShape | None:
    """Sizes of a supported causal LM; None for anything that this file does not compute exactly.

    Args:
        module: the model.
        adapters: whether linear layers may have adapters; for who calls the layers, and does not read their weights.
    """
    config = getattr(module, "config", None)
    if config is None or getattr(config, "model_type", None) not in _MODEL_TYPES or not _plain_options(config):
        return None
    if not _plain_parts(module, config, adapters):
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LeanShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        mlp_size=config.intermediate_size,
        vocab_size=module.lm_head.weight.shape[0],
        max_positions=config.max_position_embeddings,
        rms_eps=config.rms_norm_eps,
        qk_norm=config.model_type == "qwen3",
    )


def _plain_options(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = getattr(config, "layer_types", None) or ()
    return (
        rope.get("rope_type", "default") == "default"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and config.hidden_act == "silu"
        and not any(kind != "full_attention" for kind in layer_types)
        and not getattr(config, "attention_dropout", 0.0)
        and getattr(config, "pretraining_tp", 1) == 1
    )


def _plain_parts(module: Any, config: Any, adapters: bool) -> bool:
    """Whether every projection is an ordinary linear layer (quantised ones are not), with or without adapters."""
    body, head = getattr(module, "model", None), getattr(module, "lm_head", None)
    if body is None or type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    if len(body.layers) != config.num_hidden_layers or type(body.embed_tokens) is not torch.nn.Embedding:
        return False
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    return all(
        type(_base_layer(getattr(part, name)) if adapters else getattr(part, name)) is torch.nn.Linear
        for layer in body.layers
        for part, names in ((layer.self_attn, attention), (layer.mlp, mlp))
        for name in names
    )


def _base_layer(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)
