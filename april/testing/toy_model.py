"""Tiny random Hugging Face models and a character tokenizer: what tests need of a policy, without any download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from april.core.errors import DataError

ToyKind = Literal["qwen3", "qwen2", "llama", "gpt_neox", "gemma2", "qwen3_moe"]
_CHARACTERS = "0123456789+-*/= ().:,;?abcdefghijklmnopqrstuvwxyz\n"


class CharTokenizer:
    """One token a character; 0 ends a response, 1 pads."""

    eos_token_id = 0
    pad_token_id = 1

    def __init__(self, characters: str = _CHARACTERS) -> None:
        self._characters = characters
        self._ids = {character: index + 2 for index, character in enumerate(characters)}

    def __len__(self) -> int:
        return len(self._characters) + 2

    def encode(self, text: str) -> list[int]:
        """Token ids of a text made of known characters."""
        unknown = sorted(set(text) - set(self._ids))
        if unknown:
            raise DataError("a text has characters that the toy tokenizer lacks", got=unknown)
        return [self._ids[character] for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of these tokens; special tokens are empty."""
        return "".join(self._characters[int(token) - 2] for token in token_ids if int(token) >= 2)


def toy_model(
    kind: ToyKind = "qwen3",
    *,
    dtype: Any = None,
    seed: int = 0,
    vocab_size: int | None = None,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_positions: int = 256,
    tied: bool = False,
    spread: float = 3.0,
    **options: Any,
) -> Any:
    """A random causal LM in evaluation mode.

    Args:
        kind: architecture.
        dtype: torch dtype; float32 when None.
        seed: of the random weights.
        vocab_size: the character tokenizer's when None.
        spread: scale of the output logits, so that greedy and sampled tokens vary.
        options: further fields of the Hugging Face config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size or len(CharTokenizer()),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": 0.15,
    }
    if kind != "gpt_neox":
        sizes |= {"num_key_value_heads": num_kv_heads, "head_dim": hidden_size // num_heads}
    if kind == "qwen3_moe":
        sizes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden_size, "norm_topk_prob": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **(sizes | options))
        module = AutoModelForCausalLM.from_config(config)
        if kind == "qwen3_moe":
            module.set_experts_implementation("eager")  # the grouped products of torch know no float64
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif name.endswith("bias"):
                    parameter.copy_(0.1 * torch.randn_like(parameter))
            head = module.get_output_embeddings().weight
            head.mul_(spread / (0.15 * hidden_size**0.5))
    return module.to(dtype or torch.float32).eval()
