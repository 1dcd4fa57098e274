"""Drawing tokens: inverse CDF at addressed uniforms, and the log-prob of the distribution that was drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from april.core.sampling import SamplingSpec

_BLOCK = 512
_PLAIN_VOCABULARY = 4_096


@dataclass(frozen=True)
class SpecBatch:
    """Sampling parameters of n rows as vectors; None where no row needs the part.

    Attributes:
        inverse_temperature: (n, 1) in the compute dtype; 1 for greedy rows.
        greedy: bool (n,).
        top_p: (n, 1), 1 where nothing is cut.
        top_k: int64 (n, 1), V where nothing is cut.
        entropy: whether any row wants entropies.
    """

    inverse_temperature: torch.Tensor | None
    greedy: torch.Tensor | None
    top_p: torch.Tensor | None
    top_k: torch.Tensor | None
    entropy: bool


def spec_batch(specs: Sequence[SamplingSpec], vocab_size: int, device: torch.device, dtype: torch.dtype) -> SpecBatch:
    """Vectors for these rows; `dtype` is that of the logits."""
    wide = compute_dtype(dtype)

    def column(values: list[float], kind: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=kind, device=device).unsqueeze(1)

    tempered = any(spec.temperature not in (0, 1) for spec in specs)
    greedy = any(spec.temperature == 0 for spec in specs)
    return SpecBatch(
        column([1 / spec.temperature if spec.temperature else 1.0 for spec in specs], wide) if tempered else None,
        torch.tensor([spec.temperature == 0 for spec in specs], device=device) if greedy else None,
        column([spec.top_p for spec in specs], wide) if any(spec.top_p < 1 for spec in specs) else None,
        column([spec.top_k or vocab_size for spec in specs], torch.int64) if any(spec.top_k for spec in specs) else None,
        any(spec.entropy for spec in specs),
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Probabilities are computed in float64 for float64 logits, else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_distribution(logits: torch.Tensor, specs: SpecBatch) -> torch.Tensor:
    """Normalised log-probs (n, V) of the distribution that is sampled from; -inf for removed tokens.

    Temperature comes first, then top-k, then top-p on what is left; both keep the most likely tokens, and the token that
    passes the mass `top_p` is still kept (Holtzman et al. 2020, "The curious case of neural text degeneration").
    """
    scaled = logits.to(compute_dtype(logits.dtype))
    if specs.inverse_temperature is not None:
        scaled = scaled * specs.inverse_temperature
    if specs.top_k is not None or specs.top_p is not None:
        scaled = scaled.masked_fill(~_kept(scaled, specs), float("-inf"))
    logprobs = torch.log_softmax(scaled, dim=-1)
    if specs.greedy is None:
        return logprobs
    best = torch.zeros_like(logprobs).fill_(float("-inf")).scatter_(1, logits.argmax(-1, keepdim=True), 0.0)
    return torch.where(specs.greedy[:, None], best, logprobs)


def _kept(scaled: torch.Tensor, specs: SpecBatch) -> torch.Tensor:
    """bool (n, V): tokens that survive top-k and top-p; equal values keep the order of their ids."""
    ordered, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if specs.top_k is not None:
        keep = keep & (rank[None] < specs.top_k)
    if specs.top_p is not None:
        mass = torch.softmax(ordered.masked_fill(~keep, float("-inf")), dim=-1)
        before = torch.cumsum(mass, dim=-1, dtype=torch.float64) - mass
        keep = keep & ((before < specs.top_p) | (specs.top_p >= 1))
    return torch.zeros_like(keep).scatter_(1, ids, keep)


def invert_cdf(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token whose interval of the cumulative distribution holds each uniform.

    Args:
        probabilities: (n, V), non-negative; need not sum to 1 exactly.
        uniforms: float64 (n,) in [0, 1).

    Returns:
        int64 (n,); never a token of probability 0.
    """
    # Below 1 by two units of rounding, a uniform times the total mass stays below the total mass.
    uniforms = uniforms.clamp(max=1 - 2**-52)
    if probabilities.shape[-1] <= _PLAIN_VOCABULARY:
        return _invert_plain(probabilities, uniforms)
    return _invert_blocks(probabilities, uniforms)


def _invert_plain(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulative = torch.cumsum(probabilities, dim=-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    # Intervals are closed below: the first index whose cumulative mass exceeds the target.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _invert_blocks(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Two levels: find the block of the vocabulary, then the token in it; float64 work is V / 512 + 512, not V."""
    size = probabilities.shape[-1]
    padded = torch.nn.functional.pad(probabilities, (0, -size % _BLOCK)).view(len(probabilities), -1, _BLOCK)
    cumulative = torch.cumsum(padded.sum(-1, dtype=torch.float64), dim=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = padded.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    within = torch.cumsum(inside, dim=-1, dtype=torch.float64)
    token = torch.searchsorted(within, target - before, right=True)
    # Rounding may put the target past the block's own sum: then its last token with any mass is meant.
    last = (_BLOCK - 1) - (inside > 0).flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    return (block * _BLOCK + torch.minimum(token, last)).squeeze(1)


@dataclass(frozen=True)
class Draw:
    """Tokens int64 (n,), their log-probs (n,), and entropies (n,) or None."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor | None


def draw(logits: torch.Tensor, specs: SpecBatch, uniforms: torch.Tensor) -> Draw:
    """Sample one token a row.

    Args:
        logits: (n, V).
        specs: vectors for the n rows.
        uniforms: float64 (n,).
    """
    logprobs = log_distribution(logits, specs)
    probabilities = logprobs.exp()
    tokens = invert_cdf(probabilities, uniforms)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    entropies = None
    if specs.entropy:
        entropies = -(probabilities * logprobs.masked_fill(logprobs == float("-inf"), 0.0)).sum(-1)
    return Draw(tokens, chosen, entropies)
