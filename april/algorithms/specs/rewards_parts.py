"""Configs of the built-in reward transforms that read judgements, costs and run times. No torch."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from april.algorithms.atoms import Info, builtin
from april.algorithms.specs.named import PATTERN, column, optional_column
from april.algorithms.specs.rewards import Transform


@builtin("reward", "april.algorithms.rewards.parts:weighted_parts")
class WeightedParts(Transform):
    """A weighted sum of named parts (ReEx-SQL's composite)."""

    info: ClassVar[Info] = Info(
        paper="ReEx-SQL (arXiv 2505.12768)",
        formula="keep R + sum of weight * part",
        certainty="B",
        golden=("reex_sql_composite",),
    )
    type: Literal["weighted_parts"] = "weighted_parts"
    weights: dict[str, float] = Field(min_length=1, description='column -> weight, such as "part.format" = 2.0')
    keep: float = Field(0.0, description="factor of the reward as it was")

    @field_validator("weights")
    @classmethod
    def _columns(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = [name for name in value if not re.match(PATTERN, name)]
        if wrong:
            raise ValueError(f"columns are named part.NAME or item.NAME, not {', '.join(wrong)}")
        return value

    @property
    def needs(self) -> frozenset[str]:
        """The reward and the parts."""
        return self.requires | frozenset(self.weights)


@builtin("reward", "april.algorithms.rewards.parts:flaw_penalty")
class FlawPenalty(Transform):
    """Right answers whose reasoning a judge found flawed earn less (FAPO)."""

    info: ClassVar[Info] = Info(
        paper="FAPO (arXiv 2510.22543)",
        formula="right - penalty [flawed] if correct else wrong",
        certainty="B",
        golden=("fapo_reward",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "correct"})
    column_options: ClassVar[tuple[str, ...]] = ("flawed",)
    type: Literal["flaw_penalty"] = "flaw_penalty"
    right: float = Field(1.0, description="reward of a right answer")
    wrong: float = Field(-1.0, description="reward of a wrong answer")
    penalty: float = Field(1.0, ge=0, description="taken from a right answer with flawed reasoning")
    flawed: str = column("part.flawed", "column above 0.5 where a judge found a flaw; missing: sound")


@builtin("reward", "april.algorithms.rewards.parts:cost_discount")
class CostDiscount(Transform):
    """Success is worth less the more it cost; no success, no reward (xRouter)."""

    info: ClassVar[Info] = Info(
        paper="xRouter (arXiv 2510.08439)",
        formula="R (base - min(price * cost, max))",
        certainty="B",
        golden=("xrouter_cost_reward",),
    )
    column_options: ClassVar[tuple[str, ...]] = ("cost",)
    type: Literal["cost_discount"] = "cost_discount"
    base: float = Field(1.0, description="worth of a success that cost nothing")
    price: float = Field(3.0, ge=0, description="of one unit of cost")
    max_discount: float = Field(0.8, ge=0, description="largest discount")
    cost: str = column("part.cost", "column with the cost of a sample")


@builtin("reward", "april.algorithms.rewards.parts:cost_blend")
class CostBlend(Transform):
    """Success is blended with how cheap it was among the samples of the batch (Router-R1)."""

    info: ClassVar[Info] = Info(
        paper="Router-R1 (arXiv 2506.09033)",
        formula="(R + f) (1 - a) + a c if R > 0 else R + f; -1 if f < 0",
        certainty="A",
        golden=("router_r1_cost_and_reward",),
    )
    column_options: ClassVar[tuple[str, ...]] = ("cost", "format_part")
    type: Literal["cost_blend"] = "cost_blend"
    cost_fraction: float = Field(0.5, ge=0, le=1, description="share of the reward that cheapness decides")
    cost: str = column("part.cost", "column with the price of a sample")
    format_part: str | None = optional_column("column below 0 for a format error, else added to the reward")
    low_quantile: float = Field(0.05, ge=0, le=1, description="prices up to this quantile of the batch are cheapest")
    high_quantile: float = Field(0.95, ge=0, le=1, description="prices from this quantile of the batch on are dearest")


@builtin("reward", "april.algorithms.rewards.parts:speed_ladder")
class SpeedLadder(Transform):
    """Programs that pass earn more the faster they are, the others by how far they came (ACECode)."""

    info: ClassVar[Info] = Info(
        paper="ACECode (arXiv 2412.17264)",
        formula="0.5 + 0.5 min(t_reference / t, cap) if all tests pass, else a ladder",
        certainty="C",
        golden=("acecode_pass_branch",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "correct"})
    column_options: ClassVar[tuple[str, ...]] = ("time", "reference_time", "compiled", "ran")
    type: Literal["speed_ladder"] = "speed_ladder"
    time: str = column("part.time_s", "column with the seconds that the program took")
    reference_time: str = column("item.reference_time_s", "column with the seconds of the reference program")
    cap: float = Field(1.0, gt=0, description="largest ratio of speeds that is rewarded")
    failed: float = Field(-0.3, description="reward of a program with wrong results")
    runtime_error: float = Field(-0.6, description="reward of a program that stops with an error")
    compile_error: float = Field(-1.0, description="reward of a program that does not start")
    compiled: str = column("part.compiled", "column that is 0 where the program did not start; missing: it did")
    ran: str = column("part.ran", "column that is 0 where the program stopped with an error; missing: it did not")


@builtin("reward", "april.algorithms.rewards.parts:improvement")
class Improvement(Transform):
    """What a program repaired, broke and gained in speed against the one it should improve (Afterburner)."""

    info: ClassVar[Info] = Info(
        paper="Afterburner (arXiv 2505.23387)",
        formula="0.5 (pass + 0.5 tanh(relative gain) [pass > 0]) + 0.2 format",
        certainty="A",
        golden=("afterburner_reward",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward", "correct"})
    column_options: ClassVar[tuple[str, ...]] = ("time", "baseline_time", "baseline_passes", "format_part")
    type: Literal["improvement"] = "improvement"
    time: str = column("part.time_s", "column with the seconds that the program took")
    baseline_time: str = column("item.baseline_time_s", "column with the seconds of the program to improve, where it is right")
    baseline_passes: str = column("item.baseline_passes", "column that is 1 where the program to improve is right, else 0")
    format_part: str | None = optional_column("column that is 1 where the format is right; left out: it always is")
    improve_weight: float = Field(0.5, ge=0, description="of the improvement")
    format_weight: float = Field(0.2, ge=0, description="of the format")
    gain_weight: float = Field(0.5, ge=0, description="of the gain in speed within the improvement")
    sharpness: float = Field(1.0, gt=0, description="factor of the relative gain inside tanh")
    max_time_s: float = Field(90.0, gt=0, description="longer times count as this, and so do programs that fail")
