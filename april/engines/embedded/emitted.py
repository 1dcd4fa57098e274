"""What a decode step hands to the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from april.core.routes import Routes
from april.engines.embedded.sampler import Draw
from april.engines.embedded.slots import Ints

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Column:
    """One new token for each of n slots; `entropies` is None where no slot asked, `routes` where none are recorded."""

    slots: Ints
    tokens: Ints
    logprobs: Doubles
    entropies: Doubles | None
    routes: Routes | None = None


@dataclass(frozen=True)
class Emitted:
    """New tokens of all slots; without guesses each has one.

    Attributes:
        slots: (n,).
        values: (2 or 3, n, Q): tokens, log-probs and, where asked, entropies; a row uses its first `counts` places.
        counts: (n,).
        routes: (n, layers, k), experts of the pass that drew the tokens, in steps of one token a slot.
    """

    slots: Ints
    values: Doubles
    counts: Ints
    routes: Routes | None = None

    def not_finite(self) -> Ints:
        """Slots whose log-probs are not numbers: so were the logits that their tokens were drawn from."""
        finite = np.isfinite(self.values[1])
        if finite.all():
            return self.slots[:0]
        broken: Ints = self.slots[(~finite & (np.arange(finite.shape[1]) < self.counts[:, None])).any(1)]
        return broken

    def columns(self, ended: Mapping[int, object]) -> Iterator[Column]:
        """First tokens of all slots, then second ones, and so on; slots that are in `ended` by then have no more."""
        for place in range(self.values.shape[2]):
            rows = self.counts > place
            if ended:
                rows &= ~np.isin(self.slots, list(ended))
            if not rows.any():
                return
            picked = self.values[:, rows, place]
            entropies = picked[2] if len(picked) > 2 else None
            routes = None if self.routes is None else self.routes[rows]
            yield Column(self.slots[rows], picked[0].astype(np.int64), picked[1], entropies, routes)


def host_values(drawn: Draw) -> Doubles:
    """(2 or 3, n): tokens, log-probs and, where asked, entropies; one copy from the device for all of them."""
    columns = [drawn.tokens.double(), drawn.logprobs.double()]
    if drawn.entropies is not None:
        columns.append(drawn.entropies.double())
    values: Doubles = torch.stack(columns).cpu().numpy()
    return values
