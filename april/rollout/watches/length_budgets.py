"""Length budgets by subgroup (HBPO): the members of a group are given different budgets, so that short answers get their chance
without long ones being punished. A budget is part of the sample's sampling spec from the start: any engine keeps it to the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.rollout.watch import Siblings, Verdict


class LengthBudgetsConfig(Config):
    """Give the members of each group different budgets of response tokens."""

    type: Literal["length_budgets"] = "length_budgets"
    budgets: tuple[int, ...] = Field(
        (512, 1024, 2048, 2560), min_length=1, description="response tokens; the group is split evenly over them, in order"
    )
    slack: float = Field(1.0, ge=1, description="a response may be so many times as long as its budget before it ends")


class LengthBudgets:
    """Budgets at issue; nothing is stopped later."""

    def __init__(self, config: LengthBudgetsConfig) -> None:
        self.config = config

    def budgets(self, prompt: Prompt, group_size: int, max_new_tokens: int) -> Sequence[int] | None:
        given = self.config.budgets
        chosen = (given[member * len(given) // group_size] for member in range(group_size))
        return [min(max_new_tokens, max(1, int(budget * self.config.slack))) for budget in chosen]

    def look(self, sample: Sample, siblings: Siblings) -> Verdict | None:
        return None
