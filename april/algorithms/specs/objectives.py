"""Configs of the built-in objectives: losses beside the policy's surrogate. No torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from april.algorithms.atoms import Atom, Info, Scope, builtin, parse
from april.algorithms.specs.aggregate import SolvedTokenMean, TokenMean
from april.algorithms.specs.penalties import Term
from april.core.errors import RecipeError

TARGET = "april.algorithms.losses.objectives:pair_loss"


class Objective(Term):
    """Base of the objectives: which model they train."""

    role: ClassVar[Literal["policy", "value"]] = "policy"


@builtin("objectives", "april.algorithms.losses.objectives:value")
class ValueLoss(Objective):
    """Squared error of the value model, clipped around its estimate before the update (PPO)."""

    info: ClassVar[Info] = Info(
        paper="PPO (arXiv 1707.06347); PPO2 (OpenAI baselines); T-PPO (arXiv 2506.15050)",
        formula="max((V - R)^2, (clip(V, V_before - c, V_before + c) - R)^2) / 2",
        certainty="A",
        golden=("value_loss_clipped",),
    )
    role: ClassVar[Literal["policy", "value"]] = "value"
    requires: ClassVar[frozenset[str]] = frozenset({"value", "return"})
    optional: ClassVar[frozenset[str]] = frozenset({"reward", "token_reward"})
    type: Literal["value"] = "value"
    aggregate: SerializeAsAny[Atom] | None = Field(TokenMean(), description="how its tokens add up")
    clip: float | None = Field(0.2, gt=0, description="how far a prediction may move in one batch; none when left out")
    finished_only: bool = Field(False, description="leave out samples that ended at their token budget")


@builtin("objectives", "april.algorithms.losses.objectives:imitate")
class Imitate(Objective):
    """Negative log-likelihood of the solved samples."""

    info: ClassVar[Info] = Info(paper="VAPO (arXiv 2504.05118), equation 10", formula="-log p on solved samples", certainty="B")
    requires: ClassVar[frozenset[str]] = frozenset({"correct"})
    type: Literal["nll"] = "nll"
    coefficient: float = Field(0.1, ge=0, description="factor of the loss")
    aggregate: SerializeAsAny[Atom] | None = Field(SolvedTokenMean(), description="how its tokens add up")


class PairLoss(Objective):
    """Base of the losses on pairs of samples of a group, one better than the other."""

    scope: ClassVar[Scope] = "group"
    with_reference: ClassVar[bool] = True
    type: str
    beta: float = Field(0.1, gt=0, description="nats of reward for a nat of log-ratio")
    pairs: Literal["best_worst", "all"] = Field(
        "best_worst", description="one pair a group, by reward; or every solved with every unsolved sample"
    )
    length_average: bool = Field(False, description="mean in place of the sum over a sample's tokens")

    @model_validator(mode="before")
    @classmethod
    def _own_aggregate(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("aggregate") is not None:
            return data
        mean = {"type": "pair_mean", "pairs": data.get("pairs", "best_worst")}
        return {**data, "aggregate": parse("aggregate", mean, where="aggregate")}

    @model_validator(mode="after")
    def _one_choice_of_pairs(self) -> PairLoss:
        counted = getattr(self.aggregate, "pairs", self.pairs)
        if counted != self.pairs:
            raise RecipeError(
                "the aggregate counts other pairs than the objective makes",
                where=f"algorithm.objectives.{self.type}: pairs, aggregate.pairs",
                got=f"{self.pairs}, {counted}",
                hint="leave aggregate out, or set both to the same",
            )
        return self

    @property
    def min_group_size(self) -> int:
        """A pair."""
        return 2

    @property
    def needs(self) -> frozenset[str]:
        """What says which sample is better, and the reference where there is one."""
        return frozenset({"reward", "correct", "behaviour"} | ({"reference"} if self.with_reference else set()))

    def options(self) -> dict[str, Any]:
        """With the loss's name and whether it has a reference."""
        return {**super().options(), "kind": self.type, "with_reference": self.with_reference}


@builtin("objectives", TARGET)
class Dpo(PairLoss):
    """Direct preference optimisation on pairs of the group."""

    info: ClassVar[Info] = Info(
        paper="DPO (arXiv 2305.18290)", formula="-log sigmoid(beta delta)", certainty="A", golden=("dpo_family_pair_losses",)
    )
    type: Literal["dpo"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="probability that a pair is the wrong way round")


@builtin("objectives", TARGET)
class RobustDpo(PairLoss):
    """DPO without the bias that wrong pairs bring."""

    info: ClassVar[Info] = Info(
        paper="robust DPO (arXiv 2403.00409)",
        formula="(-(1 - e) log sigmoid(beta delta) + e log sigmoid(-beta delta)) / (1 - 2 e)",
        certainty="B",
    )
    type: Literal["robust"] = "robust"
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="probability that a pair is the wrong way round")


@builtin("objectives", TARGET)
class Hinge(PairLoss):
    """Hinge loss on the implicit margin (SLiC)."""

    info: ClassVar[Info] = Info(
        paper="SLiC (arXiv 2305.10425)", formula="max(1 - beta delta, 0)", certainty="A", golden=("dpo_family_pair_losses",)
    )
    type: Literal["hinge"] = "hinge"


@builtin("objectives", TARGET)
class Ipo(PairLoss):
    """Squared distance of the margin from 1 / (2 beta), on means over tokens."""

    info: ClassVar[Info] = Info(
        paper="IPO (arXiv 2310.12036)", formula="(delta - 1 / (2 beta))^2", certainty="A", golden=("dpo_family_pair_losses",)
    )
    type: Literal["ipo"] = "ipo"
    length_average: bool = Field(True, description="mean in place of the sum over a sample's tokens")


@builtin("objectives", TARGET)
class SimPo(PairLoss):
    """DPO on mean log-probs without a reference, with a margin."""

    info: ClassVar[Info] = Info(
        paper="SimPO (arXiv 2405.14734)",
        formula="-log sigmoid(beta delta - margin)",
        certainty="A",
        golden=("dpo_family_pair_losses",),
    )
    with_reference: ClassVar[bool] = False
    type: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="factor of the mean log-probs")
    margin: float = Field(0.5, description="margin that the chosen must have")
    length_average: bool = Field(True, description="mean in place of the sum over a sample's tokens")


@builtin("objectives", TARGET)
class Nca(PairLoss):
    """Noise-contrastive alignment: raises the chosen in absolute terms as well."""

    info: ClassVar[Info] = Info(
        paper="NCA (arXiv 2402.05369)",
        formula="-log sigmoid(bc) - (log sigmoid(-bc) + log sigmoid(-bj)) / 2",
        certainty="B",
    )
    type: Literal["nca"] = "nca"


@builtin("objectives", TARGET)
class Bco(PairLoss):
    """Binary classifier: chosen above, rejected below the mean implicit reward of the step's pairs."""

    info: ClassVar[Info] = Info(
        paper="BCO (arXiv 2404.04656)",
        formula="-log sigmoid(bc - D) - log sigmoid(D - bj), D the mean of both",
        certainty="A",
        golden=("dpo_family_pair_losses",),
    )
    scope: ClassVar[Scope] = "batch"
    type: Literal["bco"] = "bco"
    centre: float | None = Field(None, description="D, nats of reward; the mean over the step's pairs when left out")


@builtin("objectives", TARGET)
class Sppo(PairLoss):
    """Self-play preference optimisation with hard labels."""

    info: ClassVar[Info] = Info(
        paper="SPPO (arXiv 2405.00675)",
        formula="(c - 1/(2b))^2 + (j + 1/(2b))^2",
        certainty="A",
        golden=("dpo_family_pair_losses",),
    )
    type: Literal["sppo"] = "sppo"


@builtin("objectives", TARGET)
class ApoZero(PairLoss):
    """Anchored preference optimisation: chosen up, rejected down."""

    info: ClassVar[Info] = Info(paper="APO (arXiv 2408.06266)", formula="1 - sigmoid(bc) + sigmoid(bj)", certainty="B")
    type: Literal["apo_zero"] = "apo_zero"


@builtin("objectives", TARGET)
class ApoDown(PairLoss):
    """Anchored preference optimisation for pairs that are both worse than the policy."""

    info: ClassVar[Info] = Info(paper="APO (arXiv 2408.06266)", formula="sigmoid(bc) + 1 - sigmoid(b delta)", certainty="B")
    type: Literal["apo_down"] = "apo_down"


@builtin("objectives", TARGET)
class Exo(PairLoss):
    """Reverse KL from the implicit preference to the smoothed label."""

    info: ClassVar[Info] = Info(paper="EXO (arXiv 2402.00856)", formula="KL(sigmoid(b delta) || (1 - e, e))", certainty="B")
    type: Literal["exo"] = "exo"
    label_smoothing: float = Field(1e-3, gt=0, lt=0.5, description="mass of the wrong label")


@builtin("objectives", TARGET)
class Aot(PairLoss):
    """DPO on log-ratios sorted over the step: the chosen's distribution above the rejected's."""

    info: ClassVar[Info] = Info(paper="AOT (arXiv 2406.05882)", formula="dpo on sorted c and sorted j", certainty="B")
    scope: ClassVar[Scope] = "batch"
    type: Literal["aot"] = "aot"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="probability that a pair is the wrong way round")


@builtin("objectives", TARGET)
class DiscoPop(PairLoss):
    """Logistic and exponential loss, mixed by a gate that was found by search."""

    info: ClassVar[Info] = Info(
        paper="DiscoPOP (arXiv 2406.08414)", formula="(1 - g) log(1 + e^-z) + g e^-z, g = sigmoid(z / temperature)", certainty="B"
    )
    type: Literal["discopop"] = "discopop"
    temperature: float = Field(0.05, gt=0, description="of the gate")


@builtin("objectives", TARGET)
class Rpo(PairLoss):
    """Distance of the implicit margin from the rewards' margin: pairs of equal reward are pulled together."""

    info: ClassVar[Info] = Info(
        paper="RPO (arXiv 2502.00203)",
        formula="distance(beta delta, eta (R_c - R_j))",
        certainty="A",
        golden=("rpo_pairwise",),
    )
    type: Literal["rpo"] = "rpo"
    eta: float = Field(1.0, gt=0, description="nats of implicit reward for one of reward")
    distance: Literal["squared", "backward_kl", "forward_kl"] = Field("squared", description="between the two margins")
