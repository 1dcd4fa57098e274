"""The models that are timed: Qwen3 shapes with random weights, and what one decode step of each has to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from april.core.errors import DataError, nearest

WEIGHT_SEED = 0
MAX_POSITIONS = 1024
_BYTES = 4  # float32


@dataclass(frozen=True, slots=True)
class BenchShape:
    """A Qwen3 decoder in float32 whose output head is its embedding matrix.

    Attributes:
        name: what `--model` takes.
        num_layers, num_heads, num_kv_heads, head_dim, hidden_size, mlp_size, vocab_size: its sizes.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    mlp_size: int
    vocab_size: int

    @property
    def layer_products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the matrix products of one layer: queries-keys-values, out, gate-and-up, down."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            (self.hidden_size, queries + 2 * keys),
            (queries, self.hidden_size),
            (self.hidden_size, 2 * self.mlp_size),
            (self.mlp_size, self.hidden_size),
        )

    @property
    def head_product(self) -> tuple[int, int]:
        """(inputs, outputs) of the output head."""
        return self.hidden_size, self.vocab_size

    @property
    def num_matmul_weights(self) -> int:
        """Entries of all matrices that a decode step multiplies with."""
        layer = sum(inputs * outputs for inputs, outputs in self.layer_products)
        return self.num_layers * layer + self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """Trained numbers: matrices (the embedding is the head) and norms."""
        norms = self.num_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
        return self.num_matmul_weights + norms

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of the matrix products for one token, without attention."""
        return 2 * self.num_matmul_weights

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of context holds in all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * _BYTES

    def hf_config(self) -> dict[str, Any]:
        """Fields of the Hugging Face config; there is no token that ends a response."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": MAX_POSITIONS,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.num_parameters / 1e6:.1f} M parameters: {self.num_layers} layers, hidden {self.hidden_size}, "
            f"{self.num_heads} heads ({self.num_kv_heads} of keys and values) of {self.head_dim}, mlp {self.mlp_size}, "
            f"vocabulary {self.vocab_size}"
        )


SHAPES = {
    shape.name: shape
    for shape in (
        BenchShape("tiny", 2, 2, 1, 32, 64, 128, 256),
        BenchShape("1m", 4, 4, 2, 32, 128, 384, 2048),
        BenchShape("3m", 4, 8, 4, 32, 256, 640, 2048),
        BenchShape("25m", 8, 8, 4, 64, 512, 1280, 8192),
        BenchShape("100m", 12, 12, 4, 64, 768, 2560, 16384),
    )
}
"""By name; "tiny" is for trying out the benchmark itself."""


def shape_named(name: str) -> BenchShape:
    """The shape of this name.

    Raises:
        DataError: when there is none.
    """
    if name not in SHAPES:
        raise DataError("an unknown benchmark model", where="--model", got=name, hint=nearest(name, SHAPES))
    return SHAPES[name]
