"""`april bench compile`: what `torch.compile` makes of a decode step, and after how many steps its compile time is won back.

own       the forward as the engine runs it: rows read as far as the longest of them
static    the same with fixed shapes, which a compiled (or captured) step needs: rows read to their capacity
compiled  the static step behind `torch.compile`
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from april.bench.arithmetic import ratio, spread
from april.bench.shapes import MAX_POSITIONS
from april.bench.worker import random_model
from april.core.errors import DataError, ModelError
from april.models.kv import KvBucket
from april.models.kv_static import StaticRows
from april.models.lean_decode import LeanDecoder
from april.models.linear import FrozenLinear

TOLERANCE = 1e-4
_ROUND_S = 0.5


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What is measured.

    Attributes:
        model: name of a shape.
        rows: samples in one decode step, all in one length class.
        context_tokens: KV of each row; the class holds the next power of two.
        rounds: of all steps in turn.
        threads: CPU threads of torch.

    Raises:
        DataError: when the models have no such position.
    """

    model: str = "3m"
    rows: int = 256
    context_tokens: int = 100
    rounds: int = 5
    threads: int = 2

    def __post_init__(self) -> None:
        if self.capacity > MAX_POSITIONS:
            raise DataError("the models have fewer positions", where="--context-tokens", got=self.context_tokens)

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return 1 << self.context_tokens.bit_length()


class DecodeSteps:
    """One decode step of n rows in the ways that are compared; each writes one token at the same place of its own KV."""

    def __init__(self, options: CompileOptions) -> None:
        decoder = LeanDecoder.from_module(random_model(options.model))
        if decoder is None:
            raise ModelError("the lean forward does not know this model", got=options.model)
        self._decoder, self._options = decoder, options
        decoder.fix_addresses(options.capacity)
        generator = torch.Generator().manual_seed(0)
        kv = torch.randn(self._bucket().data.shape, generator=generator)
        self._own_rows, padded = self._bucket(), self._bucket()
        for bucket in (self._own_rows, padded):
            bucket.data.copy_(kv)
        self._static_rows = StaticRows(padded, options.rows)
        self._tokens = torch.randint(0, decoder.shape.vocab_size, (options.rows,), generator=generator)
        self._positions = torch.full((options.rows,), options.context_tokens)
        self._compiled = torch.compile(self._step, dynamic=False)

    def _bucket(self) -> KvBucket:
        shape, options = self._decoder.shape, self._options
        sizes = (shape.num_layers, shape.num_kv_heads, shape.head_dim)
        bucket = KvBucket(*sizes, options.capacity, torch.float32, torch.device("cpu"))
        bucket.resize(options.rows)
        bucket.size = options.rows
        return bucket

    def own(self) -> torch.Tensor:
        """Logits (n, V) by the engine's default."""
        self._own_rows.set_lengths([self._options.context_tokens] * self._options.rows)
        self._own_rows.begin_step()
        return self._decoder.decode(self._tokens, self._positions, self._options.context_tokens + 1, [self._own_rows])

    def static(self) -> torch.Tensor:
        """Logits (n, V) with fixed shapes."""
        return self._step(self._tokens, self._positions)

    def compiled(self) -> torch.Tensor:
        """Logits (n, V) of the compiled step; the first call compiles."""
        logits: torch.Tensor = self._compiled(self._tokens, self._positions)
        return logits

    def _step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._static_rows.begin_step(positions)
        return self._decoder.decode(tokens, positions, self._options.capacity, [self._static_rows])


@contextmanager
def products_outside_graphs() -> Iterator[None]:
    """Dense products are called as they are by compiled code."""
    before = FrozenLinear.__call__, FrozenLinear.added_to
    outside: Any = torch.compiler.disable
    try:
        FrozenLinear.__call__, FrozenLinear.added_to = map(outside, before)  # type: ignore[method-assign]
        yield
    finally:
        FrozenLinear.__call__, FrozenLinear.added_to = before  # type: ignore[method-assign]


@products_outside_graphs()
@torch.inference_mode()
def run_compile_bench(options: CompileOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Compile once without any cache, then time the steps in turn.

    Returns:
        Seconds of a compilation, of each kind of step and own / compiled round by round, and the steps after which a
        compilation has paid, None where it never does.

    Raises:
        ModelError: when the logits differ by more than 1e-4.
    """
    import torch._inductor.config as inductor

    torch.set_num_threads(options.threads)
    steps = DecodeSteps(options)
    with inductor.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's opinions on complex numbers and thread pools
        started_s = time.perf_counter()
        logits = steps.compiled()
        compile_s = time.perf_counter() - started_s
    difference = max(float((logits - other).abs().max()) for other in (steps.own(), steps.static()))
    if difference > TOLERANCE:
        raise ModelError("a step gives other logits", got=difference, expected=f"at most {TOLERANCE:g}")
    kinds = {"own": steps.own, "static": steps.static, "compiled": steps.compiled}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for index in range(options.rounds):
        for name in list(kinds) if index % 2 == 0 else list(kinds)[::-1]:
            seconds[name].append(_mean_s(kinds[name]))
    spreads = {name: spread(values) for name, values in seconds.items()}
    say(f"{options.model}, {options.rows} rows: compiled in {compile_s:.1f} s")
    return {
        "options": asdict(options),
        "compile_s": compile_s,
        "step_s": {name: value.to_json() for name, value in spreads.items()},
        "speedup": ratio(seconds["own"], seconds["compiled"]).to_json(),
        "steps_to_pay": steps_to_pay(compile_s, spreads["own"].median, spreads["compiled"].median),
    }


def _mean_s(work: Callable[[], object]) -> float:
    """Mean seconds of as many calls as fill a round, one at least."""
    count, started_s = 0, time.perf_counter()
    while True:
        work()
        count += 1
        passed_s = time.perf_counter() - started_s
        if passed_s >= _ROUND_S:
            return passed_s / count


def steps_to_pay(compile_s: float, own_s: float, compiled_s: float) -> int | None:
    """Steps after which a compilation of one shape has won back its time; None when a step gains nothing."""
    return math.ceil(compile_s / (own_s - compiled_s)) if compiled_s < own_s else None


def compile_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row a result, in Markdown."""
    from april.bench.table import rows_of, spread_text

    header = ("one shape", "own, ms", "static, ms", "compiled, ms", "compiled is", "compile time, s", "steps to win it back")
    rows = []
    for item in results:
        options, medians = item["options"], {name: value["median"] * 1e3 for name, value in item["step_s"].items()}
        rows.append(
            [
                f"{options['model']}, {options['rows']} rows",
                *(f"{medians[name]:.2f}" for name in ("own", "static", "compiled")),
                spread_text(item["speedup"], 2) + "x",
                f"{item['compile_s']:.1f}",
                "never" if item["steps_to_pay"] is None else str(item["steps_to_pay"]),
            ]
        )
    return rows_of(header, rows)
