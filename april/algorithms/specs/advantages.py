"""Configs of the advantages that compare a sample with its siblings. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from april.algorithms.atoms import Info, Siblings, builtin

Std = Literal["sample", "population", "siblings", "batch", "none"]
STD = (
    "scale: standard deviation of the group with n - 1, with n, of the siblings alone (1 where they agree), of all samples of "
    "the batch, or none"
)
TOKEN_REWARD = frozenset({"token_reward"})
EPS = "added to the standard deviation"


class Scaled(Siblings):
    """Base of the advantages that divide by a standard deviation or not."""

    @property
    def idle_options(self) -> Mapping[str, str]:
        """Nothing is added where nothing is divided by."""
        return {"eps": "std"} if getattr(self, "std", "sample") == "none" else {}


@builtin("advantage", "april.algorithms.advantages.group:group_relative")
class GroupRelative(Scaled):
    """Reward minus the group's mean, over its standard deviation (GRPO; `std = "none"`: Dr.GRPO)."""

    info: ClassVar[Info] = Info(
        paper="GRPO (arXiv 2402.03300), section 4.1.1; Dr.GRPO (arXiv 2503.20783); 2-GRPO (arXiv 2510.00977)",
        formula="(R - mean_g) / (std_g + eps)",
        certainty="A",
        golden=(
            "grpo_advantage_std",
            "grpo_advantage_no_std",
            "grpo_degenerate_zero_std_and_singleton",
            "two_grpo_pairs",
            "ps_grpo_group_similarity",
        ),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["group"] = "group"
    std: Std = Field("sample", description=STD)
    eps: float = Field(1e-6, ge=0, description=EPS)
    leave_one_out: bool = Field(False, description="subtract the mean of the siblings, not of the whole group")
    singleton: Literal["zero", "raw"] = Field("zero", description="what a sample without siblings gets: 0, or its reward")


@builtin("advantage", "april.algorithms.advantages.group:leave_one_out")
class LeaveOneOut(Siblings):
    """Reward minus the mean of the siblings (RLOO, LOOP)."""

    info: ClassVar[Info] = Info(
        paper="RLOO (arXiv 2402.14740), equation 5; LOOP (arXiv 2503.00897)",
        formula="R - mean of the siblings",
        certainty="A",
        golden=("rloo_advantage", "loop_leave_one_out"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["leave_one_out"] = "leave_one_out"
    singleton: Literal["zero", "raw"] = Field("zero", description="what a sample without siblings gets: 0, or its reward")


@builtin("advantage", "april.algorithms.advantages.group:optimal_baseline")
class OptimalBaseline(Siblings):
    """Reward minus the group's mean, weighted by length (OPO)."""

    info: ClassVar[Info] = Info(
        paper="OPO (arXiv 2505.23585)",
        formula="R - sum_g(length R) / sum_g(length)",
        certainty="B",
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "mask"})
    type: Literal["optimal_baseline"] = "optimal_baseline"
    singleton: Literal["zero", "raw"] = Field("zero", description="what a sample without siblings gets: 0, or its reward")


@builtin("advantage", "april.algorithms.advantages.group:maximum_likelihood")
class MaximumLikelihood(Siblings):
    """Reward minus the group's mean, over that mean: rare successes weigh most (MaxRL)."""

    info: ClassVar[Info] = Info(paper="MaxRL (arXiv 2602.02710)", formula="(R - mean_g) / (mean_g + eps)", certainty="B")
    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["maximum_likelihood"] = "maximum_likelihood"
    eps: float = Field(1e-6, gt=0, description="added to the mean; groups with a mean up to it get 0")


@builtin("advantage", "april.algorithms.advantages.group:pass_at_k")
class PassAtK(Siblings):
    """Credit for the best of k draws from the group, in closed form; needs solved or not, no reward."""

    info: ClassVar[Info] = Info(
        paper="Pass@k training (arXiv 2508.10751)",
        formula="p = 1 - C(n-c,k)/C(n,k); (1-p)/s if correct, else (1-p-C(n-c-1,k-1)/C(n-1,k-1))/s; s = sqrt(p(1-p)) + eps",
        certainty="B",
    )
    requires: ClassVar[frozenset[str]] = frozenset({"correct"})
    type: Literal["pass_at_k"] = "pass_at_k"
    k: int = Field(4, ge=1, description="draws; groups of fewer members get 0")
    eps: float = Field(1e-6, ge=0, description=EPS)

    @property
    def min_group_size(self) -> int:
        """As many as are drawn."""
        return max(2, self.k)


@builtin("advantage", "april.algorithms.advantages.group:decoupled")
class Decoupled(Scaled):
    """Each named part of the reward is made group-relative by itself, then they are added (GDPO)."""

    info: ClassVar[Info] = Info(
        paper="GDPO (arXiv 2601.05242)",
        formula="sum_j w_j (part_j - mean_g) / (std_g + eps), then whiten",
        certainty="B",
    )
    type: Literal["decoupled"] = "decoupled"
    parts: dict[str, float] = Field(min_length=1, description="weight of each named part of the reward; 0 takes one away")
    std: Std = Field("sample", description=STD)
    eps: float = Field(1e-6, ge=0, description=EPS)

    @property
    def needs(self) -> frozenset[str]:
        """The columns of the named parts."""
        return frozenset(f"part.{name}" for name, weight in self.parts.items() if weight != 0)

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if not any(self.parts.values()):
            raise ValueError("a weight other than 0")
        return self


@builtin("advantage", "april.algorithms.advantages.group:rubric")
class Rubric(Scaled):
    """Items of a rubric, weighted by how sure the critic is of them across the group (GRAPE)."""

    info: ClassVar[Info] = Info(
        paper="GRAPE (arXiv 2509.04501)",
        formula="R = sum_j(w_j c_j score_j) / sum_j(w_j c_j), c_j = mean_g confidence_j; R - mean_g",
        certainty="C",
        golden=("grape_confidence_weighted",),
    )
    type: Literal["rubric"] = "rubric"
    items: dict[str, float] = Field(
        min_length=1, description="weight of each item; the reward brings the parts <item> and <item>_confidence"
    )
    std: Std = Field("none", description=STD)
    eps: float = Field(1e-6, ge=0, description=EPS)

    @property
    def needs(self) -> frozenset[str]:
        """The columns of the items and their confidences."""
        named = [name for name, weight in self.items.items() if weight != 0]
        return frozenset(f"part.{name}{end}" for name in named for end in ("", "_confidence"))

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if min(self.items.values()) < 0 or sum(self.items.values()) <= 0:
            raise ValueError("weights at least 0, and one above it")
        return self


@builtin("advantage", "april.algorithms.advantages.group:token_weighted")
class TokenWeighted(Siblings):
    """Reward minus its mean over all tokens of the group, over the standard deviation there (HAPO's group average)."""

    info: ClassVar[Info] = Info(
        paper="HAPO (arXiv 2509.16591), token-level group average",
        formula="(R - mean over the group's tokens) / (std over them + eps); beyond the limit that of GRPO",
        certainty="A",
        golden=("hapo_token_level_group_average",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "mask"})
    type: Literal["token_weighted"] = "token_weighted"
    eps: float = Field(1e-6, ge=0, description=EPS)
    limit: float = Field(5.0, gt=0, description="largest absolute credit before that of GRPO takes its place")


@builtin("advantage", "april.algorithms.advantages.sets:polychromic")
class Polychromic(Siblings):
    """Sets of siblings score by mean reward times the share of different ones; a sample gets the credit of its sets."""

    info: ClassVar[Info] = Info(
        paper="Poly-PPO (arXiv 2509.25424)",
        formula="f = mean R * different / n; mean over the sample's sets of f - mean_g f",
        certainty="B",
        golden=("polychromic_set_advantage",),
    )
    type: Literal["polychromic"] = "polychromic"
    set_size: int = Field(4, ge=1, description="members of a set; smaller groups get 0")
    num_sets: int = Field(4, ge=2, description="sets of each group")
    seed: int = Field(0, ge=0, description="which sets; the same at every update")
    signature: Literal["response", "last_step"] = Field(
        "response", description="samples differ if their responses do, or if their last steps do"
    )
    delimiter_ids: tuple[int, ...] = Field((), description="token ids at which a step begins; empty: steps are turns")
    window_tokens: int | None = Field(
        None, ge=1, description="first tokens that get the sets' credit; the others that of a value model; null: all"
    )
    gamma: float = Field(1.0, ge=0, le=1, description="discount from token to token outside the window")
    lam: float = Field(0.95, ge=0, le=1, description="outside the window: 0 trusts the value model, 1 the rewards")

    @property
    def min_group_size(self) -> int:
        """One set."""
        return max(2, self.set_size)

    @property
    def idle_options(self) -> Mapping[str, str]:
        """What only a window or the last step reads."""
        window = {} if self.window_tokens is not None else {"gamma": "window_tokens", "lam": "window_tokens"}
        return window | ({"delimiter_ids": "signature"} if self.signature == "response" else {})

    @property
    def needs(self) -> frozenset[str]:
        """Columns by signature and window."""
        steps = {"turn", "anchor"} if self.signature == "last_step" and not self.delimiter_ids else set()
        window = {"value", "mask"} if self.window_tokens is not None else set()
        return frozenset({"reward", "token_ids", *steps, *window})

    @property
    def reads(self) -> frozenset[str]:
        """With rewards of tokens outside the window."""
        return self.needs | (TOKEN_REWARD if self.window_tokens is not None else set())
