"""Configs of the built-in reward transforms: length, siblings, divergence. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from april.algorithms.atoms import Info, builtin
from april.algorithms.specs.named import NamesColumns, column, optional_column
from april.core.errors import RecipeError


class Transform(NamesColumns):
    """Base of the reward transforms: what they give back is the reward of the atoms after them."""

    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    provides: ClassVar[frozenset[str]] = frozenset({"reward"})


@builtin("reward", "april.algorithms.rewards.length:overlong")
class Overlong(Transform):
    """Linear penalty on responses near the length limit (DAPO soft overlong punishment)."""

    info: ClassVar[Info] = Info(
        paper="DAPO (arXiv 2503.14476), section 3.4",
        formula="R - factor * clip((len - (max - buffer)) / buffer, 0, 1)",
        certainty="A",
        golden=("dapo_overlong_soft_punishment",),
    )
    type: Literal["overlong"] = "overlong"
    max_tokens: int = Field(gt=0, description="response tokens at which the penalty reaches `factor`")
    buffer_tokens: int = Field(gt=0, description="the penalty starts this many tokens before max_tokens")
    factor: float = Field(1.0, ge=0, description="penalty at max_tokens and beyond")

    @model_validator(mode="after")
    def _buffer_fits(self) -> Overlong:
        if self.buffer_tokens > self.max_tokens:
            raise RecipeError(
                "the buffer is longer than the limit",
                where="algorithm.reward.overlong: buffer_tokens, max_tokens",
                got=f"{self.buffer_tokens} > {self.max_tokens}",
            )
        return self


@builtin("reward", "april.algorithms.rewards.length:shorter_is_better")
class ShorterIsBetter(Transform):
    """Right answers earn more the shorter they are among the right answers of their group (JET)."""

    info: ClassVar[Info] = Info(
        paper="JET (arXiv 2509.23392)",
        formula="w_c correct + w_f format + [correct] (a (1 - d) (longest - len) / (longest - shortest) + d)",
        certainty="A",
        golden=("jet_length_reward",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "correct"})
    column_options: ClassVar[tuple[str, ...]] = ("format_part",)
    type: Literal["shorter_is_better"] = "shorter_is_better"
    strength: float = Field(1.2, ge=0, description="length reward of the shortest right answer, without the floor's share")
    floor: float = Field(0.05, ge=0, le=1, description="length reward of the longest right answer")
    correct_weight: float = Field(0.9, ge=0, description="reward of a right answer")
    format_weight: float = Field(0.1, ge=0, description="reward of the right format")
    format_part: str | None = optional_column("column that is 1 where the format is right; left out: it always is")


@builtin("reward", "april.algorithms.rewards.length:budget_reward")
class BudgetReward(Transform):
    """Right answers earn less the longer they are and the further from the budget that their prompt gave (HBPO)."""

    info: ClassVar[Info] = Info(
        paper="HBPO (arXiv 2507.15844)",
        formula="min(c(len) - |b - len| / L, c(b)) if correct, c(x) = 4 cos(pi x / 2L)",
        certainty="A",
        golden=("hbpo_reward_and_advantage",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "correct"})
    column_options: ClassVar[tuple[str, ...]] = ("budget", "format_part")
    type: Literal["budget"] = "budget"
    scale_tokens: int = Field(4096, gt=0, description="response tokens at which the reward reaches 0")
    budget: str = column("item.budget", "column with the budget in tokens; a sample without one has none")
    format_part: str | None = optional_column("column that is 1 where the format is right; left out: it always is")


@builtin("reward", "april.algorithms.rewards.siblings:reference_kl")
class ReferenceKl(Transform):
    """The divergence from the reference policy, paid in the reward of the sample or of each token (RLHF)."""

    info: ClassVar[Info] = Info(
        paper="InstructGPT (arXiv 2203.02155), equation 2; k1 of Schulman 2020",
        formula="R - beta sum(d); |d|, d^2 / 2 or exp(-d) + d - 1 in place of d = behaviour - reference",
        certainty="A",
        golden=("kl_estimators",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "reference", "mask"})
    type: Literal["reference_kl"] = "reference_kl"
    coefficient: float = Field(0.001, ge=0, description="beta, factor of the divergence")
    level: Literal["sequence", "token"] = Field(
        "sequence", description="who pays: the sample's reward, or each token by itself, for advantages that read token rewards"
    )
    kind: Literal["k1", "abs", "k2", "k3"] = Field(
        "k1", description="estimate of a token's divergence; in a reward only the gradient of k1 is that of the divergence"
    )

    @property
    def needs(self) -> frozenset[str]:
        """With the reward that the sample pays from."""
        return self.requires | ({"reward"} if self.level == "sequence" else set())

    @property
    def makes(self) -> frozenset[str]:
        """The reward of whoever pays."""
        return frozenset({"reward" if self.level == "sequence" else "token_reward"})


@builtin("reward", "april.algorithms.rewards.siblings:group_similarity")
class GroupSimilarity(Transform):
    """Mean similarity to the answers to the other wordings of the same query, in the batch (PS-GRPO)."""

    info: ClassVar[Info] = Info(
        paper="Con-RAG (arXiv 2510.04392), equation 3",
        formula="mean of sim(o, o') over the samples o' of the other prompts of the query",
        certainty="B",
        golden=("ps_grpo_group_similarity",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "token_ids", "mask"})
    column_options: ClassVar[tuple[str, ...]] = ("query",)
    type: Literal["group_similarity"] = "group_similarity"
    query: str = column("item.query", "column with a number that prompts asking the same have in common")
    weight: float = Field(1.0, ge=0, description="of the similarity")
    keep: float = Field(0.0, ge=0, description="factor of the reward as it was")
    max_ngram: int = Field(4, gt=0, description="longest run of tokens that is compared")


@builtin("reward", "april.algorithms.rewards.siblings:self_prediction")
class SelfPrediction(Transform):
    """Predictions of own pass rate and length earn their agreement with the solutions in the batch (MASA)."""

    info: ClassVar[Info] = Info(
        paper="MASA (arXiv 2510.03259)",
        formula="(base ** |predicted - true pass rate| + [shortest < predicted length < longest right solution]) / 2",
        certainty="B",
        golden=("masa_meta_reward",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "correct"})
    column_options: ClassVar[tuple[str, ...]] = ("query", "meta", "num_passes", "length")
    type: Literal["self_prediction"] = "self_prediction"
    query: str = column("item.query", "column with a number that prompts for solutions and for predictions have in common")
    meta: str = column("item.meta", "column that is 1 where the prompt asks for a prediction")
    num_passes: str = column("part.num_passes", "column with the predicted number of right solutions")
    length: str = column("part.length_tokens", "column with the predicted length of a right solution")
    num_rollouts: int = Field(8, gt=0, description="solutions that the predicted number of passes is out of")
    base: float = Field(0.01, gt=0, lt=1, description="reward of a pass rate that is wrong by 1")
