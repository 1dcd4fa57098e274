"""What the engines are asked to generate: prompts of random tokens, and a forced number of new tokens for each.

Random weights never end a response by themselves, so each request carries its own length, the same for every engine.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from april.core.errors import DataError

Lengths = npt.NDArray[np.int64]
Kind = Literal["fixed", "lognormal", "azure"]
KINDS: tuple[Kind, ...] = ("fixed", "lognormal", "azure")
TRACE_COLUMN = "GeneratedTokens"


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """How lengths and prompts are made; all of it is written into the results.

    Attributes:
        prompt_tokens: of every prompt.
        fixed_tokens: new tokens of each request of the workload "fixed".
        mu, sigma: of the logarithm of a length of the workload "lognormal"; exp(mu) is its median.
        cap_tokens: no request of a long-tailed workload is longer; longer ones are cut.
        seed: of lengths and prompts.
        group_size: requests that share a prompt.
        trace: CSV file with a column GeneratedTokens, for the workload "azure".
    """

    prompt_tokens: int = 32
    fixed_tokens: int = 128
    mu: float = 3.4
    sigma: float = 1.0
    cap_tokens: int = 512
    seed: int = 0
    group_size: int = 1
    trace: str | None = None


def lognormal_lengths(num: int, mu: float, sigma: float, cap_tokens: int, seed: int) -> Lengths:
    """round(exp(mu + sigma z)) for standard normal z, at least 1 and at most `cap_tokens`; int64 (num,)."""
    normal = np.random.default_rng([seed, 1]).standard_normal(num)
    return np.clip(np.rint(np.exp(mu + sigma * normal)), 1, cap_tokens).astype(np.int64)


def trace_lengths(path: Path, num: int, cap_tokens: int, seed: int) -> Lengths:
    """`num` response lengths drawn without replacement from a trace, at least 1 and at most `cap_tokens`; int64 (num,).

    Raises:
        DataError: when the file lacks the column, or has fewer rows than are asked for.
    """
    if not path.is_file():
        raise DataError("there is no such trace", where=str(path), hint="give a CSV file with --trace")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if TRACE_COLUMN not in (reader.fieldnames or ()):
            raise DataError("a trace lacks its column", where=str(path), got=reader.fieldnames, expected=TRACE_COLUMN)
        values = np.array([int(row[TRACE_COLUMN]) for row in reader], np.int64)
    if len(values) < num:
        raise DataError("a trace is too short", where=str(path), got=f"{len(values)} rows", expected=f">= {num}")
    chosen = np.random.default_rng([seed, 2]).choice(values, num, replace=False)
    clipped: Lengths = np.clip(chosen, 1, cap_tokens)
    return clipped


def workload_lengths(kind: Kind, num: int, options: WorkloadOptions) -> Lengths:
    """New tokens of each request, int64 (num,).

    Raises:
        DataError: for the workload "azure" without a trace.
    """
    if kind == "fixed":
        return np.full(num, options.fixed_tokens, np.int64)
    if kind == "lognormal":
        return lognormal_lengths(num, options.mu, options.sigma, options.cap_tokens, options.seed)
    if options.trace is None:
        raise DataError(
            "the workload azure needs a trace", where="--trace", hint="a CSV of AzurePublicDataset's LLM inference traces"
        )
    return trace_lengths(Path(options.trace), num, options.cap_tokens, options.seed)


def make_prompts(num: int, vocab_size: int, options: WorkloadOptions, round_index: int) -> list[list[int]]:
    """Random prompts, others in every round, so that no engine can keep what it computed for an earlier round."""
    rng = np.random.default_rng([options.seed, 3, round_index])
    num_distinct = -(-num // options.group_size)
    distinct = rng.integers(0, vocab_size, size=(num_distinct, options.prompt_tokens)).tolist()
    return [distinct[index // options.group_size] for index in range(num)]


def describe_lengths(lengths: Lengths) -> dict[str, float]:
    """The numbers that a reader needs to judge a workload."""
    return {
        "num": len(lengths),
        "total": int(lengths.sum()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "p99": float(np.percentile(lengths, 99)),
        "max": int(lengths.max()),
    }
