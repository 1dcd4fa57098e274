"""From measurements of a real engine to the constants of the cost model.

Every quantity is linear in its constants, so each fit is a least-squares problem with constants that are not negative:

    seconds of a decode step      table(B) + context_read K                         (B sequences, K tokens of context)
    seconds of taking samples in  fixed + admit n + per_token n L + per_token2 n L^2        (n samples of L tokens)
    seconds of an update          fixed + per_token T                               (T tokens of prompt and response)

table(B) is linear between a few batch sizes. Residuals are relative: a step of 1 ms counts as much as one of 100 ms. There are
few constants, so the best solution is found by trying every subset of them (Lawson and Hanson, "Solving Least Squares
Problems", 1974, chapter 23: the solution is the unconstrained one of the constants that are not zero).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from april.config.schema import Config
from april.core.errors import DataError
from april.engines.simulated.costs import EngineCosts, interpolated
from april.simulate.cost import Calibration, Costs, FitError, TrainCosts

NODES = (1, 4, 16, 64, 256, 1024)
"""Batch sizes between which the cost of a decode step is linear in the number of sequences."""


class DecodePoint(Config):
    """Decode steps of a batch that did not change."""

    batch: int = Field(ge=1, description="sequences decoded together")
    context_tokens: float = Field(ge=0, description="tokens of prompt and response of all of them, in the mean over the steps")
    step_s: float = Field(gt=0, description="seconds of one step")


class PrefillPoint(Config):
    """New samples taken in at once."""

    samples: int = Field(ge=1, description="how many")
    tokens: int = Field(ge=1, description="of each of them")
    seconds: float = Field(gt=0, description="until each of them had its first token: one decode step is part of it")


class UpdatePoint(Config):
    """One update of the trainer."""

    tokens: int = Field(ge=1, description="of prompts and responses")
    seconds: float = Field(gt=0, description="until the new weights were there")


class Measurements(Config):
    """Everything that was measured on one replica and its trainer."""

    what: str = Field(description="engine, policy and machine, in words")
    decode: tuple[DecodePoint, ...] = Field(description="decode steps")
    prefill: tuple[PrefillPoint, ...] = Field((), description="prefills")
    updates: tuple[UpdatePoint, ...] = Field((), description="updates")
    sample_s: float = Field(0.0, ge=0, description="each sample, outside the engine: the driver and its reward")
    sync_s: float = Field(0.0, ge=0, description="a change of weights")
    kv_tokens: int = Field(1 << 40, ge=1, description="tokens of KV that the engine holds")
    max_running: int = Field(256, ge=1, description="sequences that it decodes at once")


def fit_costs(measured: Measurements) -> Costs:
    """All constants, with how far the fit is off.

    Raises:
        DataError: fewer decode points than constants, or all of one batch size.
    """
    steps, decode = _fit_decode(measured.decode)
    taken = [(p, p.seconds - steps.step_s(p.samples, p.samples * p.tokens)) for p in measured.prefill]
    taken = [(point, seconds) for point, seconds in taken if seconds > 0]
    admit, prefill = fit_non_negative(
        [(1.0, p.samples, p.samples * p.tokens, p.samples * p.tokens**2) for p, _ in taken], [seconds for _, seconds in taken], 4
    )
    train, updates = fit_non_negative(
        [(1.0, point.tokens) for point in measured.updates], [point.seconds for point in measured.updates], 2
    )
    engine = steps.model_copy(
        update={
            "admission_s": admit[0],
            "admit_s": admit[1] + measured.sample_s,
            "prefill_per_token_s": admit[2],
            "prefill_per_token2_s": admit[3],
            "kv_tokens": measured.kv_tokens,
            "max_running": measured.max_running,
            "sync_s": measured.sync_s,
        }
    )
    return Costs(
        engine=engine,
        train=TrainCosts(fixed_s=train[0], per_token_s=train[1]),
        source=f"measured: {measured.what}",
        calibration=Calibration(decode=decode, prefill=prefill, updates=updates),
    )


def _fit_decode(points: Sequence[DecodePoint]) -> tuple[EngineCosts, FitError]:
    """The constants of a decode step: one for each node, and one for the context."""
    sizes = sorted({point.batch for point in points})
    nodes = [size for size in NODES if sizes and sizes[0] < size < sizes[-1]]
    nodes = sorted({*nodes, *sizes[:1], *sizes[-1:]})
    if len(points) < len(nodes) + 1 or len(nodes) < 2:
        raise DataError(
            "decode steps cannot be fitted",
            where="decode",
            got=f"{len(points)} points of batch sizes {sizes}",
            expected="more points than constants, of two batch sizes or more",
            hint="let the engine run more samples at once (engine.max_running)",
        )
    rows = [(*_hats(nodes, point.batch), point.context_tokens) for point in points]
    constants, error = fit_non_negative(rows, [point.step_s for point in points], len(nodes) + 1)
    table = tuple(zip(nodes, constants[:-1], strict=True))
    return EngineCosts(
        step_fixed_s=0.0, step_per_sequence_s=0.0, step_by_batch_s=table, context_token_read_s=constants[-1]
    ), error


def _hats(nodes: Sequence[int], batch: int) -> list[float]:
    """How much each node of a piecewise linear function counts at a batch size; they add up to 1."""
    return [interpolated([(other, float(other == node)) for other in nodes], batch) for node in nodes]


def fit_non_negative(
    rows: Sequence[Sequence[float]], seconds: Sequence[float], num_constants: int
) -> tuple[list[float], FitError]:
    """Constants c >= 0 that minimise the sum over points of (rows c / seconds - 1)^2.

    Args:
        rows: for each of n points the features, each >= 0; what is 0 everywhere gets the constant 0.
        seconds: what was measured, n values > 0.
        num_constants: features of a row; few, for every subset of them is tried.

    Returns:
        the constants, all 0 without points, and the errors of the fit.
    """
    if not rows:
        return [0.0] * num_constants, FitError(points=0, median_fraction=0.0, max_fraction=0.0)
    features = np.asarray(rows, np.float64) / np.asarray(seconds, np.float64)[:, None]
    scale = features.max(axis=0)
    used = [int(index) for index in np.flatnonzero(scale)]
    best, constants = float("inf"), np.zeros(num_constants)
    for chosen in itertools.chain.from_iterable(itertools.combinations(used, size) for size in range(1, len(used) + 1)):
        columns = list(chosen)
        part = features[:, columns] / scale[columns]
        solution = np.linalg.lstsq(part, np.ones(len(part)), rcond=None)[0]
        residual = float(((part @ solution - 1) ** 2).sum())
        if (solution >= 0).all() and residual < best - 1e-15:
            best, constants = residual, np.zeros(num_constants)
            constants[columns] = solution / scale[columns]
    errors = np.abs(features @ constants - 1)
    error = FitError(points=len(errors), median_fraction=float(np.median(errors)), max_fraction=float(errors.max()))
    return [float(value) for value in constants], error
