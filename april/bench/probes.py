"""What this machine can do at best: the model's own matrix products, a large square product, and copying memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from april.bench.shapes import BenchShape
from april.models.linear import FrozenLinear

_SQUARE = 1024
_MIN_REPEATS = 3


def fastest_s(work: Callable[[], object], budget_s: float) -> float:
    """The fastest of as many repetitions as fit into the budget, after one that warms up."""
    work()
    best, deadline, repeats = float("inf"), time.perf_counter() + budget_s, 0
    while repeats < _MIN_REPEATS or time.perf_counter() < deadline:
        started_s = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started_s)
        repeats += 1
    return best


class MatmulProbe:
    """The matrix products of one decode step, one after the other, with as many distinct weights as the model has."""

    def __init__(self, shape: BenchShape, budget_s: float) -> None:
        self._budget_s = budget_s
        generator = torch.Generator().manual_seed(0)
        products = [*(shape.layer_products * shape.num_layers), shape.head_product]
        self._weights = [torch.randn(outputs, inputs, generator=generator) * 0.02 for inputs, outputs in products]
        self._transposed = [weight.t().contiguous() for weight in self._weights]
        self._frozen = [FrozenLinear(weight) for weight in self._weights]

    @torch.inference_mode()
    def step_s(self, rows: int) -> float:
        """Seconds for this many rows, by the fastest of the ways in which weights can lie in memory.

        The engine's own layer is one of them, so that no product of the engine is held against a slower one.
        """
        inputs = {size: torch.randn(rows, size) for size in {weight.shape[1] for weight in self._weights}}

        def linear() -> None:
            for weight in self._weights:
                F.linear(inputs[weight.shape[1]], weight)

        def product() -> None:
            for weight in self._transposed:
                torch.mm(inputs[weight.shape[0]], weight)

        def frozen() -> None:
            for layer, weight in zip(self._frozen, self._weights, strict=True):
                layer(inputs[weight.shape[1]])

        return min(fastest_s(work, self._budget_s) for work in (linear, product, frozen))


@torch.inference_mode()
def square_flops_per_s(budget_s: float) -> float:
    """Rate of a product of two large square matrices, as an orientation."""
    matrix = torch.randn(_SQUARE, _SQUARE)
    return 2 * _SQUARE**3 / fastest_s(lambda: torch.mm(matrix, matrix), budget_s)


@torch.inference_mode()
def copy_bytes_per_s(num_bytes: int, budget_s: float) -> float:
    """Bytes read and written per second while a buffer of this size is copied."""
    source = torch.zeros(num_bytes // 4)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / fastest_s(lambda: target.copy_(source), budget_s)


def measure(shape: BenchShape, rows: Sequence[int], num_bytes: int, threads: int, budget_s: float) -> dict[str, object]:
    """All probes on one and on `threads` threads.

    Args:
        rows: batch sizes; the matrix products of each are timed on `threads` threads, those of the last on one as well.
        num_bytes: size of the copied buffer.
        budget_s: of each number.
    """
    matmul, last = MatmulProbe(shape, budget_s), rows[-1]
    torch.set_num_threads(1)
    single_s = matmul.step_s(last)
    single_square, single_copy = square_flops_per_s(budget_s), copy_bytes_per_s(num_bytes, budget_s)
    torch.set_num_threads(threads)
    step_s = {str(count): matmul.step_s(count) for count in rows}
    return {
        "matmul_step_s": step_s,
        "matmul_flops_per_s": last * shape.flops_per_token / step_s[str(last)],
        "matmul_flops_per_s_single": last * shape.flops_per_token / single_s,
        "square_flops_per_s": square_flops_per_s(budget_s),
        "square_flops_per_s_single": single_square,
        "copy_bytes": num_bytes,
        "copy_bytes_per_s": copy_bytes_per_s(num_bytes, budget_s),
        "copy_bytes_per_s_single": single_copy,
    }
