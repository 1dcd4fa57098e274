"""Top-k and top-p without sorting whole vocabularies: nearly always few candidates decide which tokens stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_CANDIDATES = 1_024


@dataclass(frozen=True)
class Truncation:
    """What m rows keep of their V tokens; one row of values serves any number of rows.

    Attributes:
        rows: int64 (m,), which rows; None for all.
        top_k: int64 (m, 1), V where a row has none.
        top_p: float64 (m, 1), 1 where a row has none; None where no row has any.
        candidates: how many of a row's most likely tokens are sorted at first; more than any top-k below V.
        bounded: whether every row has a top-k.
        static: whether a captured step runs it: the same operators whatever the values, so no row comes to need more candidates.
    """

    rows: torch.Tensor | None
    top_k: torch.Tensor
    top_p: torch.Tensor | None
    candidates: int
    bounded: bool
    static: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for truncations that may take each other's values."""
        rows = None if self.rows is None else len(self.rows)
        return rows, self.top_p is None, self.candidates, self.bounded, self.static

    @property
    def values(self) -> list[torch.Tensor]:
        """The tensors that differ between truncations of one kind."""
        return [part for part in (self.rows, self.top_k, self.top_p) if part is not None]


def truncation_of(
    top_k: npt.NDArray[np.float64], top_p: npt.NDArray[np.float64], vocab_size: int, device: torch.device, *, static: bool
) -> Truncation | None:
    """What these n rows cut, or None; a top-k of 0 and a top-p of 1 cut nothing.

    Args:
        static: see `Truncation`; all rows are then treated alike.
    """
    top_k = np.where(top_k > 0, np.minimum(top_k, vocab_size), vocab_size)
    cuts = (top_k < vocab_size) | (top_p < 1)
    if not cuts.any():
        return None
    chosen = np.arange(len(cuts)) if static else np.flatnonzero(cuts)
    top_k, top_p = top_k[chosen], top_p[chosen]
    has_k = top_k < vocab_size
    # One rank more than stays tells whether the last token that stays has an equal behind it.
    candidates = 1 + int(top_k[has_k].max(initial=0))
    if not has_k.all():
        candidates = max(candidates, vocab_size if static else _CANDIDATES)
    return Truncation(
        torch.from_numpy(chosen).to(device) if len(chosen) < len(cuts) else None,
        torch.from_numpy(top_k.astype(np.int64)).to(device).unsqueeze(1),
        torch.from_numpy(top_p).to(device).unsqueeze(1) if (top_p < 1).any() else None,
        min(candidates, vocab_size),
        bool(has_k.all()),
        static,
    )


def truncated(scaled: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """Logits (n, V) with -inf for the tokens that are cut; of equal ones those with the smaller ids stay."""
    if truncation.rows is None:
        return _cut(scaled, truncation)
    return scaled.index_copy(0, truncation.rows, _cut(scaled.index_select(0, truncation.rows), truncation))


def _cut(scaled: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    size, width = scaled.shape[1], truncation.candidates
    ordered = scaled.topk(width).values if width < size else scaled.sort(dim=-1, descending=True).values
    counts = _counts(scaled, ordered, truncation)
    last = ordered.gather(1, counts - 1)
    if truncation.static or _equals_behind(ordered, counts, last):
        cut = scaled.masked_fill(~_kept_of_equals(scaled, ordered, counts, last), float("-inf"))
    else:
        cut = scaled.masked_fill(scaled < last, float("-inf"))
    if truncation.static or width == size:
        return cut
    short = (counts == width).squeeze(1).nonzero().squeeze(1)
    return cut.index_copy(0, short, _cut(scaled[short], _whole(truncation, short, len(scaled), size))) if len(short) else cut


def _whole(truncation: Truncation, short: torch.Tensor, num_rows: int, size: int) -> Truncation:
    """The same for those of the rows that need all tokens sorted."""
    top_k, top_p = truncation.top_k.expand(num_rows, 1)[short], truncation.top_p
    top_p = None if top_p is None else top_p.expand(num_rows, 1)[short]
    return Truncation(None, top_k, top_p, size, truncation.bounded, truncation.static)


def _counts(scaled: torch.Tensor, ordered: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """int64 (m, 1): how many of the most likely tokens stay, at least one and at most as many as are sorted."""
    top_k, top_p, width = truncation.top_k, truncation.top_p, ordered.shape[1]
    stays = (torch.arange(width, device=scaled.device) < top_k).expand(len(scaled), -1)
    if top_p is not None:
        # Summed in float64, so that a row's number does not depend on how many candidates other rows need.
        mass = (ordered - ordered[:, :1]).exp().masked_fill(~stays, 0.0)
        upto = mass.cumsum(-1, dtype=torch.float64)
        total = upto[:, -1:]
        if width < scaled.shape[1] and not truncation.bounded:
            everything = (scaled.logsumexp(-1, keepdim=True).double() - ordered[:, :1]).exp()
            total = torch.where(top_k < scaled.shape[1], total, everything)
        stays = stays & ((upto - mass < top_p * total) | (top_p >= 1))
    return stays.sum(-1, keepdim=True).clamp(min=1)


def _equals_behind(ordered: torch.Tensor, counts: torch.Tensor, last: torch.Tensor) -> bool:
    """Whether some row cuts a token that is as likely as the last one that stays."""
    width = ordered.shape[1]
    behind = ordered.gather(1, counts.clamp(max=width - 1))
    return bool(((behind == last) & (counts < width)).any())


def _kept_of_equals(scaled: torch.Tensor, ordered: torch.Tensor, counts: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """bool (m, V): tokens above the last one that stays, and so many of its equals, smaller ids first, as there is room for."""
    room = counts - (ordered > last).sum(-1, keepdim=True)
    equal = scaled == last
    return (scaled > last) | (equal & (equal.cumsum(-1) <= room))
