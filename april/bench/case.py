"""What is measured: one case is one model, one workload and one number of requests; and how much effort it gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from april.bench.shapes import BenchShape
from april.bench.workload import Kind, WorkloadOptions, make_prompts, workload_lengths
from april.core.errors import DataError

APRIL = "april"
LONG_TAILED_BATCH_ROWS = 64

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """What is generated; its name stands in results and baselines.

    Attributes:
        shape, kind, num_requests, options: what was asked for.
        lengths: int64 (num_requests,), new tokens of each request.

    Raises:
        DataError: when no request decodes after its first token.
    """

    shape: BenchShape
    kind: Kind
    num_requests: int
    options: WorkloadOptions
    lengths: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", workload_lengths(self.kind, self.num_requests, self.options))
        if int(self.lengths.max()) < 2:
            raise DataError("no request decodes after its first token", where=self.name)

    @property
    def name(self) -> str:
        return f"{self.shape.name}/{self.kind}/{self.num_requests}"

    @property
    def batch_rows(self) -> int:
        """Batch size of engines that run static batches: all requests where their lengths are equal."""
        return self.num_requests if self.kind == "fixed" else min(LONG_TAILED_BATCH_ROWS, self.num_requests)

    @property
    def kv_bytes(self) -> int:
        """KV of all requests half way through."""
        tokens = self.num_requests * self.options.prompt_tokens + int(self.lengths.sum()) // 2
        return tokens * self.shape.kv_bytes_per_token

    def prompts(self, round_index: int) -> list[list[int]]:
        """Those of one round."""
        return make_prompts(self.num_requests, self.shape.vocab_size, self.options, round_index)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: of every engine, unless its seconds are spent.
        engine_s: after so many seconds in one case an engine gets no further round.
        threads: CPU threads of each engine.
        probe_s: seconds of each single probe of the machine.
    """

    rounds: int = 5
    engine_s: float = 120.0
    threads: int = 2
    probe_s: float = 0.15


@dataclass
class EngineRecord:
    """What one engine did in one case.

    Attributes:
        rounds: measurements, in order.
        failed: why there are no more of them.
    """

    rounds: list[Record] = field(default_factory=list)
    failed: str | None = None

    def spent_s(self) -> float:
        """Seconds of all rounds."""
        return float(sum(item["wall_s"] + item["prefill_wall_s"] for item in self.rounds))
