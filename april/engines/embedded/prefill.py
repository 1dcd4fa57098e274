"""Starting samples: compute each distinct prefix once, copy what a relative or an earlier life already has."""

from __future__ import annotations

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
    """Where the KV of a request comes from; None when it has no token that needs any."""

    kv: torch.Tensor | None
    mixed: bool = False


def compute_prefixes(forward: Forward, running: RunningBatch, requests: Sequence[Request], *, share: bool) -> tuple[int, int]:
    """Add requests to the running batch with the KV of all their tokens but the last.

    Args:
        share: whether equal prefixes are computed once.

    Returns:
        Tokens computed, and tokens copied instead.
    """
    sources = {request.id: _known(running, request, share) for request in requests}
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
    computed = sum(len(prefix) for prefix in distinct.values())
    return computed, sum(len(request.context) - 1 for request in requests) - computed


def _known(running: RunningBatch, request: Request, share: bool) -> _Source | None:
    """KV that exists already: the sample's own, else a running relative's, else one that was kept."""
    prefix = request.context[:-1]
    if not len(prefix):
        return None
    own = running.kept.take(request.id, prefix)
    if own is not None:
        return _Source(own.kv[..., : len(prefix), :], own.mixed)
    if not share:
        return None
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
