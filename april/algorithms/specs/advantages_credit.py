"""Configs of the advantages that tell the tokens of a sample apart: returns, values, steps and trees. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, Siblings, builtin
from april.algorithms.specs.advantages import EPS, STD, TOKEN_REWARD, Scaled, Std


@builtin("advantage", "april.algorithms.advantages.returns:reward_to_go")
class RewardToGo(Atom):
    """Rewards from here on, with or without a baseline that the data bring (REINFORCE, REINFORCE++, ReMax, PVPO)."""

    info: ClassVar[Info] = Info(
        paper="REINFORCE; REINFORCE++ (arXiv 2501.03262); ReMax (arXiv 2310.10505); PVPO (arXiv 2508.21104)",
        formula="sum_(s >= t) gamma^(s - t) reward_s - baseline",
        certainty="A",
        golden=("reward_to_go_minus_greedy_baseline_remax", "pvpo_static_anchor"),
    )
    optional: ClassVar[frozenset[str]] = TOKEN_REWARD
    type: Literal["reward_to_go"] = "reward_to_go"
    gamma: float = Field(1.0, ge=0, le=1, description="discount from token to token")
    baseline: str | None = Field(
        None, description="column to subtract: a number of the item, such as 'item.baseline', or 'baseline'; null: nothing"
    )

    @property
    def needs(self) -> frozenset[str]:
        """With the column of the baseline."""
        return frozenset({"reward", "mask", *(() if self.baseline is None else (self.baseline,))})


@builtin("advantage", "april.algorithms.advantages.returns:gae")
class Gae(Atom):
    """Generalised advantage estimation with a value model (PPO; `unfinished = "hold"`: T-PPO)."""

    info: ClassVar[Info] = Info(
        paper="GAE (arXiv 1506.02438), equation 16; T-PPO (arXiv 2506.15050), EGAE",
        formula="d_t = reward_t + gamma V_(t+1) - V_t; A_t = d_t + gamma lam A_(t+1); return_t = A_t + V_t",
        certainty="A",
        golden=("gae_advantage", "egae_truncated_vs_finished"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "value", "mask", "finished"})
    provides: ClassVar[frozenset[str]] = frozenset({"return"})
    optional: ClassVar[frozenset[str]] = TOKEN_REWARD
    type: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1, description="discount from token to token")
    lam: float = Field(0.95, ge=0, le=1, description="0 trusts the value model, 1 the rewards")
    value_lam: float | None = Field(
        None, ge=0, le=1, description="the same for what the value model is trained towards; null: as lam"
    )
    unfinished: Literal["reward", "hold"] = Field(
        "reward",
        description="samples that end at their budget: their reward counts, or their last value is held and it does not",
    )


@builtin("advantage", "april.algorithms.advantages.steps:anchored")
class Anchored(Scaled):
    """Samples against siblings, plus steps against the group's steps from the same state (GiGPO)."""

    info: ClassVar[Info] = Info(
        paper="GiGPO (arXiv 2505.10978)",
        formula="(R - mean_g) / F + omega (g_t - mean over steps from the same state) / F; g_t = r_t + gamma g_(t+1)",
        certainty="A",
        golden=("gigpo_advantage",),
    )
    optional: ClassVar[frozenset[str]] = TOKEN_REWARD
    type: Literal["anchored"] = "anchored"
    gamma: float = Field(0.95, ge=0, le=1, description="discount from step to step")
    omega: float = Field(1.0, ge=0, description="weight of the credit of steps")
    std: Std = Field("none", description=STD)
    eps: float = Field(1e-6, ge=0, description=EPS)
    delimiter_ids: tuple[int, ...] = Field(
        (), description="token ids at which a step begins; its state is the step before; empty: steps are turns"
    )

    @property
    def needs(self) -> frozenset[str]:
        """Steps from columns or from delimiters."""
        return _with_steps(self.delimiter_ids)


@builtin("advantage", "april.algorithms.advantages.steps:same_step")
class SameStep(Siblings):
    """Samples against siblings, plus steps against the group's steps of the same index (UI-S1)."""

    info: ClassVar[Info] = Info(
        paper="UI-S1 (arXiv 2509.11543)",
        formula="w_e z_g(R) + w_s z_(g, index)(g_t); g_t = r_t + gamma g_(t+1) while the step matches",
        certainty="A",
        golden=("ui_s1_discounted_return", "ui_s1_advantage"),
    )
    optional: ClassVar[frozenset[str]] = TOKEN_REWARD
    type: Literal["same_step"] = "same_step"
    gamma: float = Field(0.5, ge=0, le=1, description="discount from step to step")
    episode_weight: float = Field(1.0, ge=0, description="weight of the credit of whole samples")
    step_weight: float = Field(1.0, ge=0, description="weight of the credit of steps")
    eps: float = Field(1e-6, ge=0, description=EPS)
    match: str | None = Field(
        None, description="column that is true in steps that agree with a demonstration; null: returns reach over all steps"
    )
    count_episodes: Literal["each_step", "once"] = Field(
        "each_step", description="a sample counts in the group's statistics at each of its steps, or once"
    )
    delimiter_ids: tuple[int, ...] = Field((), description="token ids at which a step begins; empty: steps are turns")

    @property
    def needs(self) -> frozenset[str]:
        """Steps from columns or from delimiters, and the column of matches."""
        return _with_steps(self.delimiter_ids) | ({self.match} if self.match is not None else set())


def _with_steps(delimiter_ids: tuple[int, ...]) -> frozenset[str]:
    return frozenset({"reward", "token_ids"} if delimiter_ids else {"reward", "turn", "anchor"})


class _Tree(Scaled):
    """Options of all that read trees off the tokens."""

    requires: ClassVar[frozenset[str]] = frozenset({"reward", "token_ids"})
    segment_tokens: int = Field(512, ge=1, description="tokens of a node of the tree")
    delimiter_ids: tuple[int, ...] = Field((), description="token ids at which a node begins, in place of a fixed length")

    @property
    def idle_options(self) -> Mapping[str, str]:
        """Delimiters take the place of a length."""
        return {**super().idle_options, **({"segment_tokens": "delimiter_ids"} if self.delimiter_ids else {})}


@builtin("advantage", "april.algorithms.advantages.tree:subgroups")
class TreeSubgroups(_Tree):
    """Reward relative to the samples below each shared prefix, averaged over the prefixes (TreePO)."""

    info: ClassVar[Info] = Info(
        paper="TreePO (arXiv 2508.17445), subgroup advantage",
        formula="mean over ancestors d with siblings of (R - mean_d), or weighted by their number; then whiten",
        certainty="A",
        golden=("treepo_subgroup_advantage_average", "treepo_subgroup_advantage_group_size"),
    )
    type: Literal["tree_subgroups"] = "tree_subgroups"
    strategy: Literal["average", "group_size"] = Field(
        "average", description="mean over the prefixes, or weighted by the samples that share them"
    )
    singleton: Literal["zero", "raw"] = Field("zero", description="what a sample without siblings gets: 0, or its reward")


@builtin("advantage", "april.algorithms.advantages.tree:segment_gain")
class TreeGain(_Tree):
    """A segment gets what it adds to the value of the prefix before it (TreePO by segment)."""

    info: ClassVar[Info] = Info(
        paper="TreePO (arXiv 2508.17445), segment baseline of the release",
        formula="v(node) - v(parent); v(inner node) = mean of its children's",
        certainty="A",
        golden=("treepo_segment_advantage",),
    )
    type: Literal["tree_gain"] = "tree_gain"
    shared: Literal["each", "once"] = Field(
        "each", description="a node's credit goes to each sample that shares it, or once to all together"
    )


@builtin("advantage", "april.algorithms.advantages.tree:depthwise")
class TreeDepthwise(_Tree):
    """Rewards are carried up the tree, and nodes of one depth compared with each other (BranchGRPO)."""

    info: ClassVar[Info] = Info(
        paper="BranchGRPO (arXiv 2509.06040)",
        formula="clip((fused - mean_depth) / (std_depth + eps), +-limit); fused = mean or softmax of the children's",
        certainty="A",
        golden=("branch_grpo_depthwise",),
    )
    type: Literal["tree_depthwise"] = "tree_depthwise"
    fusion: Literal["mean", "softmax"] = Field(
        "mean", description="a node's reward is the mean of its children's, or weighted by the softmax of their log-probs"
    )
    temperature: float = Field(1.0, gt=0, description="of that softmax")
    limit: float = Field(5.0, gt=0, description="largest absolute credit")
    eps: float = Field(1e-8, ge=0, description=EPS)
    shared: Literal["each", "once"] = Field(
        "each", description="a node's credit goes to each sample that shares it, or once to all together"
    )

    @property
    def idle_options(self) -> Mapping[str, str]:
        """A mean has no temperature."""
        return {**super().idle_options, **({"temperature": "fusion"} if self.fusion == "mean" else {})}

    @property
    def needs(self) -> frozenset[str]:
        """With the log-probs of edges for the softmax."""
        return self.requires | ({"behaviour"} if self.fusion == "softmax" else set())


@builtin("advantage", "april.algorithms.advantages.tree:inter_and_intra")
class TreeInterIntra(_Tree):
    """Reward relative to all samples of the prompt, plus relative to those of the same tree (Tree-GRPO)."""

    info: ClassVar[Info] = Info(
        paper="Tree-GRPO (arXiv 2509.21240)",
        formula="(R - mean_g) / (std_g + eps) + (R - mean_tree) / (std_tree + eps)",
        certainty="A",
        golden=("tree_grpo_inter_plus_intra",),
    )
    type: Literal["tree_inter_intra"] = "tree_inter_intra"
    depth: int = Field(1, ge=1, description="samples that share this many first segments are one tree")
    std: Std = Field("sample", description=STD)
    eps: float = Field(1e-6, ge=0, description=EPS)
