"""A decode step that the host neither feeds nor watches: inputs, random numbers, stops and results stay on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from april.engines.embedded.emitted import Doubles
from april.engines.embedded.forward import LeanForward
from april.engines.embedded.sampler import SpecBatch, draw
from april.engines.embedded.slots import Ints
from april.models.kv_static import StaticRows

_TOKEN, _POSITION, _LEFT, _FIRST_STOP = range(4)
_ACTIVE = 3


@dataclass(frozen=True)
class StepInputs:
    """What rows need for a chunk of steps; N rows, padding included.

    Attributes:
        state: int64 (3 + stop tokens, N): last token, its position, tokens the row may draw, stop tokens (-1 for none).
        uniforms: float64 (K, N), for the next K tokens of each row.
        specs: sampling parameters.
    """

    state: Ints
    uniforms: Doubles
    specs: SpecBatch


class StaticStep:
    """Call it once for each step of a chunk.

    A row that has drawn a stop token, or all it may draw, stands still: it goes on feeding its last fed token at the same
    place, which changes nothing, until the host looks.

    Args:
        forward: the model, with its addresses fixed.
        rows: of each bucket, in the order of the N rows.
        inputs: of the first chunk; later ones have the same shapes.
    """

    def __init__(self, forward: LeanForward, rows: Sequence[StaticRows], inputs: StepInputs) -> None:
        self._forward, self.rows, device = forward, tuple(rows), forward.device
        self._longest = max(part.bucket.capacity for part in rows)
        self._sizes = [part.size for part in rows]
        self._state = torch.from_numpy(inputs.state).to(device, copy=True)
        self._uniforms = torch.from_numpy(inputs.uniforms).to(device, copy=True)
        self._specs = inputs.specs
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)
        steps, size = inputs.uniforms.shape
        self._out = torch.zeros((steps, 4, size), dtype=torch.float64, device=device)

    def begin_chunk(self, inputs: StepInputs) -> None:
        """Give the rows of a new chunk, of the same shapes and kinds of sampling, to the tensors that stay."""
        self._state.copy_(torch.from_numpy(inputs.state))
        self._uniforms.copy_(torch.from_numpy(inputs.uniforms))
        self._specs.take(inputs.specs)
        self._cursor.zero_()

    @torch.inference_mode()
    def __call__(self) -> None:
        """One step; the same operations on the same addresses whatever the rows hold."""
        tokens, positions, left = self._state[_TOKEN], self._state[_POSITION], self._state[_LEFT]
        for part, places in zip(self.rows, positions.split(self._sizes), strict=True):
            part.begin_step(places)
        logits = self._forward.decode(tokens, positions, self._longest, self.rows)
        drawn = draw(logits, self._specs, self._uniforms.index_select(0, self._cursor).squeeze(0))
        active = left > 0
        entropies = drawn.logprobs if drawn.entropies is None else drawn.entropies
        columns = (drawn.tokens, drawn.logprobs, entropies, active)
        self._out.index_copy_(0, self._cursor, torch.stack([column.double() for column in columns]).unsqueeze(0))
        stopped = (self._state[_FIRST_STOP:] == drawn.tokens).any(0)
        left.sub_(1).clamp_(min=0).masked_fill_(stopped, 0)
        goes_on = left > 0
        tokens.copy_(torch.where(goes_on, drawn.tokens, tokens))
        positions.add_(goes_on)
        self._cursor.add_(1)

    def results(self, num_steps: int) -> tuple[Doubles, Ints]:
        """The one copy to the host: (2 or 3, N, steps) tokens, log-probs and entropies, and how many each row has drawn."""
        found = self._out[:num_steps].cpu().numpy()
        values: Doubles = np.ascontiguousarray(found[:, : 3 if self._specs.entropy else 2].transpose(1, 2, 0))
        counts: Ints = found[:, _ACTIVE].sum(0).astype(np.int64)
        return values, counts
