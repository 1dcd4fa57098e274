"""Decoding in chunks of steps: rows padded to few sizes, one static step for each combination, captured where it recurs.

A CUDA graph replays kernels on the addresses of its capture, so a step is prepared for each combination of length classes and
padded rows, on tensors of its own. The combination is run as an ordinary call first; it is captured when it comes again.
Where nothing is captured (`capture` is None) the same step is called every time, so all but the capture is the same code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from april.engines.embedded.emitted import Doubles
from april.engines.embedded.forward import LeanForward
from april.engines.embedded.memory import KvMemory
from april.engines.embedded.sampler import SpecColumns, spec_batch_of
from april.engines.embedded.slots import Ints, SlotTable
from april.engines.embedded.static_step import StaticStep, StepInputs
from april.models.kv import KvBucket
from april.models.kv_static import StaticRows

Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]

_CAPTURE_AT_CHUNK = 3
_MOST_STEPS = 64


def padded_rows(size: int, current: int, most: int) -> int:
    """Rows of a bucket that step: the former number while it fits and is half used, else the next of 1, 2, 3, 4, 6, 8, 12, ...

    Args:
        size: occupied rows.
        current: rows of the last step; 0 for none.
        most: allocated rows.
    """
    if size <= current <= min(2 * size, most):
        return current
    power = 1 << (size - 1).bit_length()
    return min(power * 3 // 4 if size <= power * 3 // 4 else power, most)


@dataclass(frozen=True)
class ChunkRows:
    """n running samples in the order of their buckets' rows.

    Attributes:
        tokens, positions, left: (n,) last token, where it will stand, tokens that may be drawn before the host looks.
        stop_ids: (n, any), -1 where there is none.
        specs: (n, 4).
        uniforms: (K, n).
    """

    tokens: Ints
    positions: Ints
    left: Ints
    stop_ids: Ints
    specs: SpecColumns
    uniforms: Doubles


def chunk_rows(table: SlotTable, memory: KvMemory, slots: Ints, num_steps: int) -> ChunkRows:
    """What these slots need for so many steps; none draws more than its row, its buffer or its limit has room for."""
    room = np.minimum(memory.capacity[slots] - memory.num_tokens[slots], table.room(slots))
    return ChunkRows(
        tokens=table.last_token[slots],
        positions=memory.num_tokens[slots],
        left=np.minimum(np.minimum(room, table.unsampled(slots)), num_steps),
        stop_ids=table.stop_ids(slots),
        specs=table.specs(slots),
        uniforms=table.uniforms(slots, num_steps),
    )


class ChunkDecoder:
    """Runs chunks of at most `num_steps` steps.

    Args:
        forward: the model; its addresses are fixed from now on.
        num_steps: steps between two looks of the host.
        longest_tokens: of any row.
        capture: makes a replay of a step, such as `cuda_graph`; None calls the step itself.
    """

    def __init__(self, forward: LeanForward, num_steps: int, longest_tokens: int, capture: Capture | None) -> None:
        self.num_steps = num_steps
        self._forward, self._capture = forward, capture
        forward.fix_addresses(longest_tokens)
        self._steps: OrderedDict[object, _Prepared] = OrderedDict()
        self._rows: dict[int, int] = {}

    def decode(self, buckets: Sequence[KvBucket], rows: ChunkRows) -> tuple[Doubles, Ints]:
        """Draw up to `left` tokens for each row.

        Returns:
            (2 or 3, n, steps) tokens, log-probs and where asked entropies, and how many each row has drawn, (n,).
        """
        for bucket in buckets:
            self._rows[bucket.capacity] = padded_rows(bucket.size, self._rows.get(bucket.capacity, 0), bucket.rows)
        sizes = [self._rows[bucket.capacity] for bucket in buckets]
        offsets = np.cumsum([0, *sizes[:-1]])
        places = np.concatenate([start + np.arange(bucket.size) for start, bucket in zip(offsets, buckets, strict=True)])
        inputs = self._inputs(rows, places, sum(sizes))
        prepared = self._prepared(buckets, sizes, inputs)
        steps = int(rows.left.max())
        run = prepared.begin_chunk(inputs, self._capture)
        for _ in range(steps):
            run()
        values, counts = prepared.step.results(steps)
        return values[:, places], counts[places]

    def _inputs(self, rows: ChunkRows, places: Ints, size: int) -> StepInputs:
        """Rows at their places among padding, which draws nothing and samples as the first row does."""
        state = np.zeros((3 + rows.stop_ids.shape[1], size), np.int64)
        state[3:] = -1
        state[:, places] = np.vstack((rows.tokens, rows.positions, rows.left, rows.stop_ids.T))
        uniforms = np.zeros((self.num_steps, size))
        uniforms[:, places] = rows.uniforms
        specs = np.repeat(rows.specs[:1], size, axis=0)
        specs[places] = rows.specs
        forward = self._forward
        batch = spec_batch_of(specs, forward.vocab_size, forward.device, forward.dtype, static=True)
        return StepInputs(state, uniforms, batch)

    def _prepared(self, buckets: Sequence[KvBucket], sizes: Sequence[int], inputs: StepInputs) -> _Prepared:
        """The step of this combination; those whose KV memory has moved are forgotten."""
        for key in [key for key, found in self._steps.items() if not all(part.is_current for part in found.step.rows)]:
            del self._steps[key]
        key = (tuple(zip(buckets, sizes, strict=True)), len(inputs.state), inputs.specs.kind)
        prepared = self._steps.get(key)
        if prepared is None:
            rows = [StaticRows(bucket, size) for bucket, size in zip(buckets, sizes, strict=True)]
            prepared = self._steps[key] = _Prepared(StaticStep(self._forward, rows, inputs))
            if len(self._steps) > _MOST_STEPS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return prepared


class _Prepared:
    """A step, and its capture once it has come often enough."""

    def __init__(self, step: StaticStep) -> None:
        self.step, self._num_chunks = step, 0
        self._replay: Replay | None = None

    def begin_chunk(self, inputs: StepInputs, capture: Capture | None) -> Replay:
        """Hand over the rows; returns what runs one step."""
        self._num_chunks += 1
        self.step.begin_chunk(inputs)
        if capture is not None and self._replay is None and self._num_chunks >= _CAPTURE_AT_CHUNK:
            self._replay = capture(self.step)
            self.step.begin_chunk(inputs)
        return self._replay or self.step


def cuda_graph_capture(device: torch.device) -> Capture:
    """Captures on this CUDA device; all graphs share one pool of memory, since they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Replay) -> Replay:
        with torch.cuda.device(device):
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()
            # A first run on a stream of its own lets libraries allocate what a capture must not.
            side.wait_stream(main)
            with torch.cuda.stream(side):
                step()
            main.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step()
        replay: Replay = graph.replay
        return replay

    return capture
