"""The sums behind the tables: medians with their spread, ratios of paired rounds, and the roofline of decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from april.core.errors import DataError


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one number.

    Attributes:
        median: of the rounds.
        low, high: the smallest and the largest round.
        num: rounds.
    """

    median: float
    low: float
    high: float
    num: int

    def to_json(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest.

    Raises:
        DataError: when there is nothing.
    """
    if not values:
        raise DataError("a median needs at least one measurement")
    return Spread(float(np.median(values)), float(min(values)), float(max(values)), len(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of ours / theirs, round by round; rounds that one side lacks are left out.

    Raises:
        DataError: when no round has both.
    """
    return spread([mine / other for mine, other in zip(ours, theirs, strict=False)])


def running_rows(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows that decode step s = 0, 1, ... has when all requests start together and each leaves at its own length."""
    counts = np.bincount(lengths, minlength=int(lengths.max()) + 1)
    rows: npt.NDArray[np.int64] = len(lengths) - np.cumsum(counts)[:-1]
    return rows


def step_bound_s(matmul_s: float, rows: int, context_tokens: float, kv_bytes_per_token: int, bytes_per_s: float) -> float:
    """T + n c b / B: the least time of one decode step of n rows that read c tokens of KV each (see `decode_roofline`)."""
    return matmul_s + rows * context_tokens * kv_bytes_per_token / bytes_per_s


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least time that decoding takes at the speeds that the probes measured.

    Attributes:
        matmul_s: matrix products of all steps.
        kv_s: reading keys and values of all steps.
        num_steps: decode steps.
        num_tokens: tokens that these steps generate.
    """

    matmul_s: float
    kv_s: float
    num_steps: int
    num_tokens: int

    @property
    def total_s(self) -> float:
        """Nothing overlaps: on a CPU the same cores do both."""
        return self.matmul_s + self.kv_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second at the bound."""
        return self.num_tokens / self.total_s

    @property
    def step_s(self) -> float:
        """Mean time of a step at the bound."""
        return self.total_s / self.num_steps


def decode_roofline(
    lengths: npt.NDArray[np.int64],
    prompt_tokens: int,
    matmul_s_of_rows: Mapping[int, float],
    kv_bytes_per_token: int,
    bytes_per_s: float,
) -> Roofline:
    """Sum over steps s = 1, 2, ... of T(n_s) + n_s (P + s + 1) b / B; step 0 belongs to the prefill.

    n_s rows run at step s, T is the probed time of a step's matrix products, interpolated between the probed numbers of
    rows, P is the prompt's length, b the KV bytes of a token and B the probed bandwidth. Each step reads the KV of all
    tokens up to its own. (Williams, Waterman and Patterson, "Roofline", 2009, with the two terms added, not overlapped.)

    Args:
        lengths: new tokens of each request, int64 (S,); the longest has at least two.
        matmul_s_of_rows: rows -> seconds of one step's matrix products.

    Raises:
        DataError: when no request decodes after its first token.
    """
    rows = running_rows(lengths)[1:]
    if not len(rows):
        raise DataError("no request decodes after its first token", got=int(lengths.max()), expected="2 tokens or more")
    sizes = sorted(matmul_s_of_rows)
    step_s = np.interp(rows, sizes, [matmul_s_of_rows[size] for size in sizes])
    context_tokens = prompt_tokens + 2 + np.arange(len(rows))
    kv_bytes = float((rows * context_tokens).sum()) * kv_bytes_per_token
    return Roofline(float(step_s.sum()), kv_bytes / bytes_per_s, len(rows), int(rows.sum()))


def probe_rows(num: int) -> list[int]:
    """Batch sizes to probe for a workload of `num` requests: 1, 2, 4, ... and `num` itself."""
    return sorted({*(1 << power for power in range(num.bit_length())), num})
