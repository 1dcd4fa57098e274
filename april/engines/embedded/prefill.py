"""Starting samples: compute each distinct prefix once, copy what a running relative already has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from april.core.ids import SampleId
from april.engines.embedded.forward import Forward
from april.engines.embedded.running import RunningBatch
from april.engines.embedded.scheduler import Request


def compute_prefixes(forward: Forward, running: RunningBatch, requests: Sequence[Request], *, share: bool) -> tuple[int, int]:
    """Add requests to the running batch with the KV of all their tokens but the last.

    Args:
        share: whether equal prefixes are computed once.

    Returns:
        Tokens computed, and tokens copied instead.
    """
    donors = [_donor(running, request) if share else None for request in requests]
    missing = [(request, request.context[:-1]) for request, donor in zip(requests, donors, strict=True) if donor is None]
    keys = [prefix.tobytes() if share else index.to_bytes(8, "little") for index, (_, prefix) in enumerate(missing)]
    distinct = {key: prefix for key, (_, prefix) in zip(keys, missing, strict=True) if len(prefix)}
    place = {key: index for index, key in enumerate(distinct)}
    states = forward.prefill(list(distinct.values())) if distinct else None
    sources: dict[SampleId, torch.Tensor | None] = {
        request.id: states.kv_of(place[key]) if states is not None and key in place else None
        for key, (request, _) in zip(keys, missing, strict=True)
    }
    computed = sum(len(prefix) for prefix in distinct.values())
    running.expect(requests)
    for request, donor in zip(requests, donors, strict=True):
        running.add(request, sources[request.id] if donor is None else running.prefix_kv(donor, len(request.context) - 1))
    return computed, sum(len(request.context) - 1 for request in requests) - computed


def _donor(running: RunningBatch, request: Request) -> int | None:
    """The slot of a running relative whose KV begins with all of the request's tokens but the last."""
    needed = len(request.context) - 1
    if not needed:
        return None
    for slot in running.relatives(request.id):
        tokens = running.tokens(slot)
        # The last token of a running sample has no KV yet.
        if not running.is_mixed(slot) and len(tokens) > needed and np.array_equal(tokens[:needed], request.context[:needed]):
            return slot
    return None
