"""Drawing tokens: inverse CDF at addressed uniforms, and the log-prob of the distribution that was drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from april.core.sampling import SMALLEST_ENTROPY, SamplingSpec, temperature_factor
from april.engines.embedded.truncate import Truncation, truncated, truncation_of

_BLOCKS = (512, 256, 128)
_PLAIN_VOCABULARY = 1_024


@dataclass(frozen=True)
class SpecBatch:
    """Sampling parameters of n rows as vectors; None where no row needs the part.

    Attributes:
        inverse_temperature: (n, 1) in the compute dtype; 1 for greedy rows.
        greedy: bool (n,).
        truncation: top-k and top-p of the rows that have any.
        adaptive: (n, 4), what makes a row's temperature follow its entropy; strength 0 where nothing does.
        entropy: whether any row wants entropies.
        all_greedy: whether no row draws at random.
    """

    inverse_temperature: torch.Tensor | None
    greedy: torch.Tensor | None
    truncation: Truncation | None
    adaptive: torch.Tensor | None
    entropy: bool
    all_greedy: bool = False

    @property
    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        cut = self.truncation.values if self.truncation is not None else []
        return self.inverse_temperature, self.greedy, self.adaptive, *cut

    @property
    def kind(self) -> tuple[object, ...]:
        """Which operations these parameters need; equal kinds of equal size may take each other's values."""
        cut = None if self.truncation is None else self.truncation.kind
        return *(part is None for part in self._parts[:3]), cut, self.entropy, self.all_greedy

    def take(self, other: SpecBatch) -> None:
        """Copy the values of another batch of the same kind and size into the tensors of this one."""
        for part, new in zip(self._parts, other._parts, strict=True):
            if part is not None and new is not None:
                part.copy_(new)


NUM_SPEC_COLUMNS = 8
SpecColumns = npt.NDArray[np.float64]
"""(n, 8): temperature, top-p, top-k, whether entropies are wanted; strength, pivot and scales of an adaptive temperature."""


def spec_columns(spec: SamplingSpec) -> tuple[float, ...]:
    """One row of `SpecColumns`."""
    rule = spec.adaptive
    adaptive = (0.0,) * 4 if rule is None else (rule.strength, rule.pivot, rule.scale_above, rule.scale_below)
    return spec.temperature, spec.top_p, float(spec.top_k), float(spec.entropy), *adaptive


def spec_batch(specs: Sequence[SamplingSpec], vocab_size: int, device: torch.device, dtype: torch.dtype) -> SpecBatch:
    """Vectors for these rows; `dtype` is that of the logits."""
    return spec_batch_of(np.array([spec_columns(spec) for spec in specs]), vocab_size, device, dtype)


def spec_batch_of(
    columns: SpecColumns, vocab_size: int, device: torch.device, dtype: torch.dtype, *, static: bool = False
) -> SpecBatch:
    """Vectors for the rows of `columns`.

    Args:
        static: whether a captured step uses them, which does not look at values.
    """
    temperature, top_p, top_k, entropy = columns.T[:4]
    adaptive = columns[:, 4:]
    greedy, wide = temperature == 0, compute_dtype(dtype)
    tempered = bool(((temperature != 1) & ~greedy).any())
    inverse = torch.from_numpy(1 / np.where(greedy, 1.0, temperature)).to(device=device, dtype=wide).unsqueeze(1)
    return SpecBatch(
        inverse if tempered else None,
        torch.from_numpy(greedy).to(device) if greedy.any() else None,
        truncation_of(np.where(greedy, 0, top_k), np.where(greedy, 1.0, top_p), vocab_size, device, static=static),
        torch.from_numpy(adaptive.copy()).to(device=device, dtype=wide) if (adaptive[:, 0] * ~greedy).any() else None,
        bool(entropy.any()),
        bool(greedy.all()),
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Probabilities are computed in float64 for float64 logits, else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_distribution(logits: torch.Tensor, specs: SpecBatch) -> torch.Tensor:
    """Normalised log-probs (n, V) of the distribution that is sampled from; -inf for removed tokens.

    Temperature comes first, then top-k, then top-p on what is left; both keep the most likely tokens, and the token that
    passes the mass `top_p` is still kept (Holtzman et al. 2020, "The curious case of neural text degeneration").
    An adaptive temperature follows the entropy of what is left then.
    """
    scaled = _scaled(logits, specs)
    if specs.adaptive is not None:
        scaled = scaled / _factors(_entropies(torch.softmax(scaled, dim=-1)), specs.adaptive)
    logprobs = torch.log_softmax(scaled, dim=-1)
    if specs.greedy is None:
        return logprobs
    best = torch.zeros_like(logprobs).fill_(float("-inf")).scatter_(1, logits.argmax(-1, keepdim=True), 0.0)
    return torch.where(specs.greedy[:, None], best, logprobs)


def _scaled(logits: torch.Tensor, specs: SpecBatch) -> torch.Tensor:
    """Logits (n, V) of what is sampled from, in the compute dtype, but for greedy rows."""
    scaled = logits.to(compute_dtype(logits.dtype))
    if specs.inverse_temperature is not None:
        scaled = scaled * specs.inverse_temperature
    return scaled if specs.truncation is None else truncated(scaled, specs.truncation)


def _entropies(probabilities: torch.Tensor) -> torch.Tensor:
    """(n,) in nats."""
    return torch.special.entr(probabilities).sum(-1)


def _factors(entropies: torch.Tensor, adaptive: torch.Tensor) -> torch.Tensor:
    """(n, 1): what the temperature of rows with these entropies is multiplied by."""
    strength, pivot, above, below = adaptive.unbind(1)
    z = entropies.clamp(min=SMALLEST_ENTROPY).log() - pivot
    factors: torch.Tensor = temperature_factor(z, strength, above, below)
    return factors.unsqueeze(1)


def invert_cdf(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token whose interval of the cumulative distribution holds each uniform.

    Args:
        probabilities: (n, V), non-negative; need not sum to 1 exactly.
        uniforms: float64 (n,) in [0, 1).

    Returns:
        int64 (n,); never a token of probability 0. Some token of the vocabulary where probabilities are not numbers.
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
    return _within(torch.searchsorted(cumulative, target, right=True), cumulative).squeeze(1)


def _within(index: torch.Tensor, searched: torch.Tensor) -> torch.Tensor:
    """What a search found; the last place where it found none, among values that are not numbers."""
    return index.clamp_(max=searched.shape[-1] - 1)


def _invert_blocks(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Two levels: find the block of the vocabulary, then the token in it; float64 work is V / 512 + 512, not V."""
    size = probabilities.shape[-1]
    # A block length that divides V saves a padded copy of everything.
    width = next((width for width in _BLOCKS if size % width == 0), _BLOCKS[0])
    padded = torch.nn.functional.pad(probabilities, (0, -size % width)) if size % width else probabilities
    blocks = padded.view(len(probabilities), -1, width)
    cumulative = torch.cumsum(blocks.sum(-1), dim=-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    block = _within(torch.searchsorted(cumulative, target, right=True), cumulative)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, width)).squeeze(1)
    within = torch.cumsum(inside, dim=-1, dtype=torch.float64)
    token = torch.searchsorted(within, target - before, right=True)
    # Rounding may put the target past the block's own sum: then its last token with any mass is meant.
    last = (width - 1) - (inside > 0).flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    return _within(block * width + torch.minimum(token, last), probabilities).squeeze(1)


@dataclass(frozen=True)
class Draw:
    """Tokens int64 (n,), their log-probs (n,), NaN where the logits are not finite, and entropies (n,) or None."""

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
    if specs.all_greedy:
        tokens = logits.argmax(-1)
        zeros = _zero_if_finite(logits, tokens[:, None]).squeeze(1)
        return Draw(tokens, zeros, zeros if specs.entropy else None)
    # One pass instead of three: the log-prob is the logarithm of the very probability that the token was drawn with.
    scaled = _scaled(logits, specs)
    probabilities = torch.softmax(scaled, dim=-1)
    entropies = _entropies(probabilities) if specs.adaptive is not None else None
    if specs.adaptive is not None and entropies is not None:
        probabilities = torch.softmax(scaled / _factors(entropies, specs.adaptive), dim=-1)
    if specs.greedy is not None:
        ids = logits.argmax(-1, keepdim=True)
        best = torch.zeros_like(probabilities).scatter_(1, ids, 1 + _zero_if_finite(logits, ids))
        probabilities = torch.where(specs.greedy[:, None], best, probabilities)
        entropies = None if entropies is None else entropies.masked_fill(specs.greedy, 0.0)
    tokens = invert_cdf(probabilities, uniforms)
    chosen = probabilities.gather(1, tokens[:, None]).squeeze(1).log()
    if specs.entropy and entropies is None:
        entropies = _entropies(probabilities)
    return Draw(tokens, chosen, entropies)


def _zero_if_finite(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """(n, 1) in the compute dtype: 0, or NaN for rows whose largest logit, at `best`, is not finite."""
    largest = logits.gather(1, best).to(compute_dtype(logits.dtype))
    return largest - largest
