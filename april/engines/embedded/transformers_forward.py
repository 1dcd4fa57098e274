"""Any causal LM of `transformers`: with its KV in our buckets where it has ordinary KV, else step by step from all tokens."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from april.core.errors import ModelError
from april.core.routes import Routes
from april.engines.embedded.forward import Lengths, TokenRows, bucket_rows
from april.models.attention import group_lengths
from april.models.kv import KvBucket
from april.models.parameters import check_weights, parameter_shapes
from april.models.routing import Routing

_UNBOUNDED_POSITIONS = 2**20  # for architectures without a limit of their own
_MOST_PREFIX_TOKENS = 2**17


class TransformersForward:
    """The module's own forward on a deep copy of the module; computes every step from all tokens.

    Architectures differ in what they cache (windows, states, compressed KV); the tokens are what all have in common. So
    the "KV" of this forward is the token ids themselves, kept in the same buckets as real KV. Sequences are padded behind
    their last token, where causal attention does not look.
    """

    takes_drafts = False
    routes: Routes | None = None
    _routing: Routing | None = None

    def __init__(self, module: Any, dtype: torch.dtype | None = None) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        if dtype is not None:
            self.module = self.module.to(dtype)
        weight = self.module.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        self.vocab_size = self.module.get_output_embeddings().weight.shape[0]
        positions = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        self.max_positions = int(positions or _UNBOUNDED_POSITIONS)
        self._prefixes: OrderedDict[bytes, Routes] = OrderedDict()

    def record_routes(self) -> None:
        """Keep the experts of every decode step, and of sequences that are prefilled.

        Raises:
            ModelError: a model without experts.
        """
        self._routing = Routing.of(self.module)

    def bucket(self, capacity: int) -> KvBucket:
        return KvBucket(1, 1, 1, capacity, torch.float64, self.device)

    def rows(self, buckets: Sequence[KvBucket], lengths: Lengths) -> Sequence[KvBucket]:
        return bucket_rows(buckets, lengths)

    def check(self, weights: Mapping[str, Any]) -> None:
        check_weights(weights, parameter_shapes(self.module))

    @torch.no_grad()
    def load(self, weights: Mapping[str, Any]) -> None:
        """Copy weights by name; parameters tied to a given one follow it.

        Raises:
            ModelError: when a parameter is missing or has another shape; nothing has changed then.
        """
        self.check(weights)
        for name, parameter in self.module.named_parameters():
            parameter.copy_(weights[name])
        self._prefixes.clear()

    def prefix_routes(self, token_ids: npt.NDArray[np.int32]) -> Routes | None:
        return self._prefixes.get(token_ids.tobytes())

    def _keep_routes(self, rows: TokenRows) -> None:
        """Remember the experts of the sequences of the last forward pass: prompts are asked for soon, and the oldest go."""
        if self._routing is None:
            return
        chosen = self._routing.chosen().cpu().numpy().astype(self._routing.dtype)
        padded = chosen.reshape(len(rows), -1, *chosen.shape[1:])
        for row, routes in zip(rows, padded, strict=True):
            self._prefixes[row.tobytes()] = routes[: len(row)].copy()
        size = sum(map(len, self._prefixes.values()))
        while size > _MOST_PREFIX_TOKENS and len(self._prefixes) > len(rows):
            size -= len(self._prefixes.popitem(last=False)[1])

    @torch.inference_mode()
    def prefill(self, rows: TokenRows) -> RowStates:
        if self._routing is not None:
            self.module(input_ids=padded_ids(rows, self.device), use_cache=False)
            self._keep_routes(rows)
        ids = [torch.from_numpy(row.astype(np.float64)).to(self.device) for row in rows]
        return RowStates([row.view(1, 1, 1, -1, 1).expand(1, 2, 1, -1, 1) for row in ids])

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, positions: torch.Tensor, longest: int, buckets: Sequence[KvBucket]) -> torch.Tensor:
        sizes = [bucket.size for bucket in buckets]
        parts = zip(buckets, token_ids.split(sizes), positions.split(sizes), strict=True)
        logits, routes = [], []
        for bucket, ids, last in parts:
            logits.append(self.decode_bucket(bucket, ids, last))
            if self._routing is not None:
                routes.append(self._last_routes(self._routing, last))
        self.routes = np.concatenate(routes) if routes else None
        return torch.cat(logits)

    def _last_routes(self, routing: Routing, last: torch.Tensor) -> Routes:
        """Experts of the new token of each row of the bucket that was just decoded; the pass may have computed all its tokens."""
        chosen = routing.chosen().view(len(last), -1, routing.num_layers, routing.top_k)
        new = chosen[torch.arange(len(last), device=last.device), last if chosen.shape[1] > 1 else 0]
        routes: Routes = new.cpu().numpy().astype(routing.dtype)
        return routes

    def decode_bucket(self, bucket: KvBucket, token_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) that follow the new token of each row of one bucket."""
        bucket.write(0, token_ids.to(torch.float64).view(-1, 1, 1).expand(-1, 2, 1))
        history = bucket.views(0)[0].reshape(bucket.size, -1).to(torch.int64)
        logits = self.module(input_ids=history, use_cache=False).logits
        return logits[torch.arange(len(last), device=last.device), last]

    @torch.inference_mode()
    def response_logits(self, rows: TokenRows, starts: Sequence[int]) -> list[torch.Tensor]:
        logits = self.module(input_ids=padded_ids(rows, self.device), use_cache=False).logits
        return [logits[i, start - 1 : len(row) - 1] for i, (row, start) in enumerate(zip(rows, starts, strict=True))]


class CachedTransformersForward(TransformersForward):
    """For models whose every layer keeps plain keys and values of all tokens: one module call per bucket and step.

    Args:
        plain: whose copy of the module is used.

    Raises:
        ModelError: when some layer keeps something else.
    """

    def __init__(self, plain: TransformersForward) -> None:
        self.module, self.dtype, self.device = plain.module, plain.dtype, plain.device
        self.vocab_size, self.max_positions = plain.vocab_size, plain.max_positions
        self._prefixes = OrderedDict()
        cache = self._cache_of(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        key = cache.layers[0].keys
        self._sizes = (len(cache.layers), key.shape[1], key.shape[3])
        self._check_uniform(cache)

    @torch.inference_mode()
    def _cache_of(self, input_ids: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=self.module.config)
        self.module(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return cache

    def _check_uniform(self, cache: DynamicCache) -> None:
        shape = cache.layers[0].keys.shape
        for layer in cache.layers:
            if type(layer) is not DynamicLayer or layer.keys.shape != shape or layer.values.shape != shape:
                raise ModelError("this architecture keeps no plain KV", got=type(layer).__name__)

    def bucket(self, capacity: int) -> KvBucket:
        return KvBucket(*self._sizes, capacity, self.dtype, self.device)

    @torch.inference_mode()
    def prefill(self, rows: TokenRows) -> RowStates:
        ranked = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        states: dict[int, torch.Tensor] = {}
        for first, last in group_lengths([len(rows[index]) for index in ranked]):
            members = ranked[first:last]
            cache = self._cache_of(padded_ids([rows[index] for index in members], self.device))
            self._keep_routes([rows[index] for index in members])
            kv = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])
            states |= {index: kv[:, :, place, :, : len(rows[index])] for place, index in enumerate(members)}
        return RowStates([states[index] for index in range(len(rows))])

    def decode_bucket(self, bucket: KvBucket, token_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        output = self.module(
            input_ids=token_ids[:, None],
            position_ids=last[:, None],
            attention_mask=bucket.additive_mask(),
            past_key_values=_BucketCache(bucket),
            use_cache=True,
        )
        return output.logits[:, -1]


class RowStates:
    """KV of single sequences."""

    def __init__(self, states: Sequence[torch.Tensor]) -> None:
        self._states = states

    def kv_of(self, index: int) -> torch.Tensor:
        return self._states[index]


class _BucketLayer(DynamicLayer):
    """One layer's view of a bucket: stores the new token, returns all tokens."""

    def __init__(self, bucket: KvBucket, index: int) -> None:
        super().__init__()
        self._bucket, self._index, self.is_initialized = bucket, index, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._bucket.write(self._index, torch.cat((key_states, value_states), dim=1).squeeze(2))
        return self._bucket.views(self._index)

    def get_seq_length(self) -> int:
        return self._bucket.longest - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._bucket.longest, 0


class _BucketCache(Cache):
    def __init__(self, bucket: KvBucket) -> None:
        super().__init__(layers=[_BucketLayer(bucket, index) for index in range(bucket.num_layers)])


def padded_ids(rows: TokenRows, device: torch.device) -> torch.Tensor:
    """int64 (S, L), zeros behind shorter rows."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded).to(device)


def transformers_forward(module: Any, dtype: torch.dtype | None = None) -> TransformersForward:
    """The cached forward where a trial shows that it computes the same as the module alone, else the plain one."""
    plain = TransformersForward(module, dtype)
    try:
        cached = CachedTransformersForward(plain)
        return cached if _agree(plain, cached) else plain
    except Exception:
        # Models reject caches, masks or positions in their own ways; each means that the plain forward is the one to use.
        return plain


@torch.inference_mode()
def _agree(plain: TransformersForward, cached: CachedTransformersForward) -> bool:
    """Decode two rows of unequal length by one token both ways."""
    rows = [np.arange(length, dtype=np.int32) % plain.vocab_size for length in (2, 5)]
    logits = []
    for forward in (plain, cached):
        bucket, states = forward.bucket(8), forward.prefill(rows)
        bucket.resize(len(rows))
        for index, row in enumerate(rows):
            bucket.insert(states.kv_of(index), len(row))
        bucket.set_lengths([len(row) for row in rows])
        bucket.begin_step()
        positions = torch.tensor([len(row) for row in rows], device=forward.device)
        logits.append(forward.decode(torch.ones_like(positions), positions, 6, [bucket]).float())
    spread = float(logits[0].std()) + 1e-6
    tolerance = 1e-4 if plain.dtype in (torch.float32, torch.float64) else 0.1
    return float((logits[0] - logits[1]).abs().max()) <= tolerance * spread
