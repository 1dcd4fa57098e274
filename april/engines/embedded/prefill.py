"""Starting samples: compute each distinct prefix once, copy what a relative or an earlier life already has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from april.core.ids import SampleId
from april.engines.embedded.forward import Forward
from april.engines.embedded.retain import Kept
from april.engines.embedded.running import RunningBatch
from april.engines.embedded.scheduler import Request


@dataclass(frozen=True)
class _Source:
    """Where the KV of a request comes from; None when it has no token that needs any. `own`: from its earlier life."""

    kv: torch.Tensor | None
    mixed: bool = False
    own: bool = False


class PrefillCosts:
    """Tokens that each of the requests, in their order, would have computed; what an admission is charged for.

    Args:
        share: whether equal prefixes are computed once.
    """

    def __init__(self, running: RunningBatch, *, share: bool) -> None:
        self._running, self._share = running, share
        self._coming: set[bytes] = set()

    def __call__(self, request: Request) -> int:
        prefix = request.context[:-1]
        if self._running.kept.covers(request.id, prefix):
            return 0
        if self._share:
            key = prefix.tobytes()
            if key in self._coming or _of_relative(self._running, request) is not None:
                return 0
            self._coming.add(key)
        return len(prefix)


def compute_prefixes(forward: Forward, running: RunningBatch, requests: Sequence[Request], *, share: bool) -> Counter[str]:
    """Add requests to the running batch with the KV of all their tokens but the last.

    Args:
        share: whether equal prefixes are computed once.

    Returns:
        Tokens in "prefill", computed, and "shared", copied; the latter also in "forked" for children and in "resumed" where
        a sample's own KV was kept.
    """
    # What a sample takes for itself is no longer there for its relatives, so they come first.
    by_own = sorted(requests, key=lambda request: running.kept.covers(request.id, request.context[:-1]))
    sources = {request.id: _known(running, request, share) for request in by_own}
    missing = [request for request in requests if sources[request.id] is None]
    prefixes = {request.id: request.context[:-1] for request in missing if len(request.context) > 1}
    keys = {id_: prefix.tobytes() if share else repr(id_).encode() for id_, prefix in prefixes.items()}
    distinct = {keys[id_]: prefix for id_, prefix in prefixes.items()}
    place = {key: index for index, key in enumerate(distinct)}
    if distinct:
        states = forward.prefill(list(distinct.values()))
        sources |= {id_: _Source(states.kv_of(place[key])) for id_, key in keys.items()}
    running.expect(requests)
    for request in requests:
        source = sources[request.id] or _Source(None)
        running.add(request, source.kv, mixed=source.mixed)
    if share:
        _keep_prompts(running, missing, sources)
    computers = {key: id_ for id_, key in reversed(keys.items())}
    return _counted(requests, set(computers.values()), {id_ for id_, source in sources.items() if source and source.own})


def _counted(requests: Sequence[Request], computed: set[SampleId], resumed: set[SampleId]) -> Counter[str]:
    """Each request's prefix under the way in which it came by its KV."""
    tokens = Counter[str]()
    for request in requests:
        size = len(request.context) - 1
        tokens["prefill" if request.id in computed else "shared"] += size
        if request.id in resumed:
            tokens["resumed"] += size
        elif request.id.branch and request.id not in computed:
            tokens["forked"] += size
    return tokens


def _known(running: RunningBatch, request: Request, share: bool) -> _Source | None:
    """KV that exists already: the sample's own, else a relative's."""
    prefix = request.context[:-1]
    if not len(prefix):
        return None
    own = running.kept.take(request.id, prefix)
    if own is not None:
        return _Source(own.kv[..., : len(prefix), :], own.mixed, own=True)
    return _of_relative(running, request) if share else None


def _of_relative(running: RunningBatch, request: Request) -> _Source | None:
    """KV of a running relative, else of one that was kept."""
    prefix = request.context[:-1]
    for slot in running.relatives(request.id):
        tokens = running.tokens(slot)
        # The last token of a running sample has no KV yet.
        if not running.is_mixed(slot) and len(tokens) > len(prefix) and np.array_equal(tokens[: len(prefix)], prefix):
            return _Source(running.prefix_kv(slot, len(prefix)))
    relative = running.kept.of_relative(request.id, prefix)
    return None if relative is None else _Source(relative.kv[..., : len(prefix), :])


def _keep_prompts(running: RunningBatch, missing: Sequence[Request], sources: dict[SampleId, _Source | None]) -> None:
    """Members of these groups may come later; they share the prompt without its last token."""
    for request in missing:
        group, source, size = request.id.group, sources[request.id], request.num_prompt - 1
        if size and group not in running.kept and source is not None and source.kv is not None:
            running.keep(group, Kept(request.context[:size].copy(), source.kv[..., :size, :].clone()))
