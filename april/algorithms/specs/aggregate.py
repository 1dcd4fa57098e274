"""Configs of the built-in aggregates. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, builtin


@builtin("aggregate", "april.algorithms.losses.aggregate:token_mean")
class TokenMean(Atom):
    """Every token of the batch counts the same (DAPO)."""

    info: ClassVar[Info] = Info(
        paper="DAPO (arXiv 2503.14476), section 3.3",
        formula="1 / tokens",
        golden=("aggregate_token_mean",),
    )
    type: Literal["token_mean"] = "token_mean"


@builtin("aggregate", "april.algorithms.losses.aggregate:sequence_mean")
class SequenceMean(Atom):
    """Every sample counts the same, whatever its length (GRPO)."""

    info: ClassVar[Info] = Info(
        paper="GRPO (arXiv 2402.03300), equation 3",
        formula="1 / (samples * tokens of the sample)",
        golden=("aggregate_seq_mean_token_mean",),
    )
    type: Literal["sequence_mean"] = "sequence_mean"


@builtin("aggregate", "april.algorithms.losses.aggregate:sequence_sum")
class SequenceSum(Atom):
    """Mean over samples of the sum over their tokens (REINFORCE on whole responses, RLOO)."""

    info: ClassVar[Info] = Info(
        paper="RLOO (arXiv 2402.14740)",
        formula="1 / samples",
        golden=("aggregate_seq_mean_token_sum",),
    )
    type: Literal["sequence_sum"] = "sequence_sum"


@builtin("aggregate", "april.algorithms.losses.aggregate:fixed_length")
class FixedLength(Atom):
    """Sum over tokens / (samples * constant): no length bias (Dr.GRPO)."""

    info: ClassVar[Info] = Info(
        paper="Dr.GRPO (arXiv 2503.20783), section 3.2",
        formula="1 / (samples * constant)",
        golden=("aggregate_seq_mean_token_sum_norm",),
    )
    type: Literal["fixed_length"] = "fixed_length"
    constant: int = Field(gt=0, description="tokens; a fixed number such as the token budget, never a measured length")
