"""Configs of the built-in corrections and masks. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from april.algorithms.atoms import Atom, Info, Scope, builtin
from april.core.errors import RecipeError

Level = Literal["token", "sequence", "sequence_mean"]
LEVELS = "of each token, the product over its sample, or the sample's geometric mean"


@builtin("weights", "april.algorithms.losses.weights:truncated")
class Truncated(Atom):
    """Truncated importance sampling from the sampler to the proximal policy: min(w, cap)."""

    info: ClassVar[Info] = Info(
        paper="TIS (Yao et al. 2025); AReaL (arXiv 2505.24298), section 5.2",
        formula="clip(exp(proximal - behaviour), low, cap)",
        certainty="A",
        golden=("tis_token_truncated", "tis_sequence_and_normalised", "decoupled_ppo_sequence_clamp"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["tis"] = "tis"
    reweighs: ClassVar[bool] = True
    """Whether its weight is proximal over behaviour itself, so that another such factor would correct twice."""
    cap: float = Field(2.0, gt=0, description="largest weight")
    low: float = Field(0.0, ge=0, description="smallest weight")
    level: Level = Field("token", description=f"weight {LEVELS}")

    @model_validator(mode="after")
    def _ordered(self) -> Truncated:
        _check_order(self, self.low, self.cap, "low, cap")
        return self


def _check_order(atom: Atom, low: float, high: float, keys: str) -> None:
    if low > high:
        raise RecipeError(
            "no weight is left between the bounds", where=f"algorithm.weights.{atom.type}: {keys}", got=f"{low} > {high}"
        )


@builtin("weights", "april.algorithms.losses.weights:truncated_normalised")
class TruncatedNormalised(Truncated):
    """Truncated importance sampling, divided by the mean weight of the step."""

    info: ClassVar[Info] = Info(
        paper="self-normalised importance sampling; rollout correction of verl 0.7",
        formula="w / mean(w), w = clip(exp(proximal - behaviour), low, cap)",
        certainty="A",
        golden=("tis_sequence_and_normalised",),
    )
    scope: ClassVar[Scope] = "batch"
    type: Literal["tis_normalised"] = "tis_normalised"  # type: ignore[assignment]


class Masking(Atom):
    """Base of the weights that drop tokens."""

    not_options: ClassVar[frozenset[str]] = frozenset({"in_denominator"})
    in_denominator: bool = Field(
        True,
        description="dropped tokens still count in the means; false: only survivors do, so heavy rejection makes a larger step",
    )


@builtin("weights", "april.algorithms.losses.weights:masked")
class Mask(Masking):
    """Weights outside the band drop to 0, others stay (IcePop; MIS): denominators keep the original tokens."""

    info: ClassVar[Info] = Info(
        paper="IcePop (arXiv 2510.18855); MIS (Liu et al. 2025, When speed kills stability)",
        formula="w if low <= w <= high else 0, w = exp(proximal - behaviour)",
        certainty="A",
        golden=("icepop_weight", "mis_mask_geometric_veto", "decoupled_ppo_token_mask"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["mask"] = "mask"
    low: float = Field(0.5, ge=0, description="smallest weight that is kept")
    high: float = Field(5.0, gt=0, description="largest weight that is kept")
    level: Level = Field("token", description=f"what is compared: w {LEVELS}")
    keep: Literal["token", "compared", "one"] = Field(
        "token", description="what a kept token weighs: its own w, the w that was compared, or 1"
    )

    @property
    def reweighs(self) -> bool:
        """Whether tokens that are kept weigh proximal over behaviour."""
        return self.keep != "one"

    @model_validator(mode="after")
    def _ordered(self) -> Mask:
        _check_order(self, self.low, self.high, "low, high")
        return self


@builtin("weights", "april.algorithms.losses.weights:reject")
class Reject(Masking):
    """Drop tokens or samples by an estimate of how far the sampler is from the proximal policy; the rest weigh 1."""

    info: ClassVar[Info] = Info(
        paper="rejection sampling, rollout correction of verl 0.7",
        formula="1 if low <= exp(behaviour - proximal) <= high else 0; k2, k3: 1 if <= high",
        certainty="A",
        golden=("mis_token_k1_rejection",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["reject"] = "reject"
    statistic: Literal["k1", "k2", "k3"] = Field(
        "k1", description="1 / w, or an estimate of the divergence in nats that is bounded above only"
    )
    level: Literal["token", "sequence", "sequence_mean", "sequence_max"] = Field(
        "token", description="of the token, or the sum, mean or largest over its sample"
    )
    low: float = Field(0.5, ge=0, description="smallest 1 / w that is kept; k1 only")
    high: float = Field(2.0, gt=0, description="largest statistic that is kept")

    @property
    def idle_options(self) -> Mapping[str, str]:
        """A divergence has no bound below."""
        return {"low": "statistic"} if self.statistic != "k1" else {}


@builtin("weights", "april.algorithms.losses.weights:veto")
class Veto(Masking):
    """Drop samples that have a token which the proximal policy would hardly have sampled."""

    info: ClassVar[Info] = Info(
        paper="MIS (Liu et al. 2025, When speed kills stability)",
        formula="0 for a sample with any w < below, else 1",
        certainty="A",
        golden=("mis_mask_geometric_veto",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["veto"] = "veto"
    below: float = Field(1e-4, gt=0, description="a smaller weight of one token drops its sample")

    @property
    def corrects(self) -> bool:
        """It drops what is impossible and corrects nothing else."""
        return False


@builtin("weights", "april.algorithms.losses.weights:off_policy_sequences")
class OffPolicySequences(Masking):
    """Drop tokens of negative advantage in samples that the current policy has left (OPSM)."""

    info: ClassVar[Info] = Info(
        paper="DeepSeek-V3.2 (arXiv 2512.02556), equation 9",
        formula="0 if A < 0 and mean over the sample of (against - current) > max_divergence, else 1",
        certainty="A",
        golden=("off_policy_sequence_mask",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "current"})
    type: Literal["opsm"] = "opsm"
    max_divergence: float = Field(0.1, ge=0, description="nats a token")
    against: Literal["behaviour", "proximal"] = Field("behaviour", description="the policy that the sample was close to")

    @property
    def corrects(self) -> bool:
        """Positive samples stay as they are, however stale."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """With the log-probs of `against`."""
        return self.requires | {self.against}


@builtin("weights", "april.algorithms.losses.weights:second_moment")
class SecondMoment(Masking):
    """Drop the fewest tokens without which the log-weights' second moment is within a budget (M2PO)."""

    info: ClassVar[Info] = Info(
        paper="M2PO (arXiv 2510.01161), form of AReaL 1.0",
        formula="0 for the largest (behaviour - proximal)^2 until the mean of the rest < budget, else 1",
        certainty="A",
        golden=("m2po_mask_all_tokens",),
    )
    scope: ClassVar[Scope] = "batch"
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["m2po"] = "m2po"
    budget: float = Field(0.04, gt=0, description="second moment that is allowed")


@builtin("weights", "april.algorithms.losses.weights:clip_covariance")
class ClipCovariance(Masking):
    """Drop a few random ones of the tokens whose advantage and log-prob vary together (Clip-Cov)."""

    info: ClassVar[Info] = Info(
        paper="Clip-Cov (arXiv 2505.22617)",
        formula="0 for some of those with low < (A - mean A)(log p - mean log p) < high, drawn at random, else 1",
        certainty="B",
    )
    scope: ClassVar[Scope] = "batch"
    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "current", "token_ids", "step"})
    type: Literal["clip_cov"] = "clip_cov"
    fraction: float = Field(0.0002, gt=0, le=1, description="tokens that are dropped, at least one")
    low: float = Field(1.0, description="smallest covariance that may be dropped")
    high: float = Field(5.0, description="largest covariance that may be dropped")
    seed: int = Field(0, ge=0, description="which tokens are drawn; others at every update")


@builtin("weights", "april.algorithms.losses.weights:uncorrected")
class Uncorrected(Atom):
    """Weight 1, on purpose: stale tokens train as if they were fresh. For studies of what staleness does."""

    info: ClassVar[Info] = Info(paper="-", formula="1", certainty="B")
    type: Literal["uncorrected"] = "uncorrected"

    @property
    def corrects(self) -> bool:
        """It says that nothing has to be corrected."""
        return True
