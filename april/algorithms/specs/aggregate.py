"""Configs of the built-in aggregates. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, builtin


class Aggregate(Atom):
    """Base of the aggregates."""

    whole_samples: ClassVar[bool] = False
    """Whether a sample counts once where all its tokens have one loss, or by its length on purpose."""


@builtin("aggregate", "april.algorithms.losses.aggregate:token_mean")
class TokenMean(Aggregate):
    """Every token of the batch counts the same (DAPO)."""

    info: ClassVar[Info] = Info(
        paper="DAPO (arXiv 2503.14476), section 3.3",
        formula="1 / tokens",
        certainty="A",
        golden=("aggregate_token_mean",),
    )
    type: Literal["token_mean"] = "token_mean"


class PerSample(Aggregate):
    """Base of the aggregates that divide by the number of samples."""

    count_empty: bool = Field(False, description="samples without any token with mask count as well")


@builtin("aggregate", "april.algorithms.losses.aggregate:sequence_mean")
class SequenceMean(PerSample):
    """Every sample counts the same, whatever its length (GRPO)."""

    info: ClassVar[Info] = Info(
        paper="GRPO (arXiv 2402.03300), equation 3",
        formula="1 / (samples * tokens of the sample)",
        certainty="A",
        golden=("aggregate_seq_mean_token_mean",),
    )
    whole_samples: ClassVar[bool] = True
    type: Literal["sequence_mean"] = "sequence_mean"


@builtin("aggregate", "april.algorithms.losses.aggregate:sequence_sum")
class SequenceSum(PerSample):
    """Mean over samples of the sum over their tokens (REINFORCE on whole responses, RLOO)."""

    info: ClassVar[Info] = Info(
        paper="RLOO (arXiv 2402.14740)",
        formula="1 / samples",
        certainty="A",
        golden=("aggregate_seq_mean_token_sum",),
    )
    whole_samples: ClassVar[bool] = True
    type: Literal["sequence_sum"] = "sequence_sum"


@builtin("aggregate", "april.algorithms.losses.aggregate:fixed_length")
class FixedLength(PerSample):
    """Sum over tokens / (samples * constant): no length bias (Dr.GRPO)."""

    info: ClassVar[Info] = Info(
        paper="Dr.GRPO (arXiv 2503.20783), section 3.2", formula="1 / (samples * constant)", certainty="B"
    )
    type: Literal["fixed_length"] = "fixed_length"
    constant: int = Field(gt=0, description="tokens; a fixed number such as the token budget, never a measured length")


@builtin("aggregate", "april.algorithms.losses.aggregate:group_mean")
class GroupMean(Aggregate):
    """Every prompt counts the same; inside a group every token does."""

    info: ClassVar[Info] = Info(
        paper="DAPO (arXiv 2503.14476), equation 8; prompt mean of ScaleRL (arXiv 2510.13786)",
        formula="1 / (groups * tokens of the group)",
        certainty="B",
    )
    type: Literal["group_mean"] = "group_mean"


@builtin("aggregate", "april.algorithms.losses.aggregate:constant")
class Constant(Aggregate):
    """Sum over tokens over a constant, whatever the batch holds."""

    info: ClassVar[Info] = Info(
        paper="verl 0.7, seq-mean-token-sum-norm",
        formula="1 / constant",
        certainty="A",
        golden=("aggregate_seq_mean_token_sum_norm",),
    )
    type: Literal["constant"] = "constant"
    constant: float = Field(1.0, gt=0, description="denominator; 1: the plain sum")


@builtin("aggregate", "april.algorithms.losses.aggregate:pair_mean")
class PairMean(Aggregate):
    """Every pair of samples counts the same; for pair objectives."""

    info: ClassVar[Info] = Info(
        paper="DPO (arXiv 2305.18290), equation 7", formula="1 / (pairs * trained tokens of the sample)", certainty="B"
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "correct", "behaviour"})
    type: Literal["pair_mean"] = "pair_mean"
    pairs: Literal["best_worst", "all"] = Field("best_worst", description="as the objective's pairs")


@builtin("aggregate", "april.algorithms.losses.aggregate:solved_token_mean")
class SolvedTokenMean(Aggregate):
    """Every token of a solved sample counts the same; the others do not count."""

    info: ClassVar[Info] = Info(
        paper="VAPO (arXiv 2504.05118), equation 10", formula="1 / tokens of solved samples", certainty="B"
    )
    requires: ClassVar[frozenset[str]] = frozenset({"correct"})
    type: Literal["solved_token_mean"] = "solved_token_mean"
