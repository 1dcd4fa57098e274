"""Config of the advantage over several prompts of one query. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Info, builtin
from april.algorithms.specs.named import NamesColumns, column


@builtin("advantage", "april.algorithms.advantages.across:query_relative")
class QueryRelative(NamesColumns):
    """Group-relative over all prompts that ask the same, such as one question under several budgets (HBPO)."""

    info: ClassVar[Info] = Info(
        paper="HBPO (arXiv 2507.15844)",
        formula="(R - mean_q) / (std_q + eps)",
        certainty="A",
        golden=("hbpo_reward_and_advantage",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    column_options: ClassVar[tuple[str, ...]] = ("query",)
    type: Literal["query_group"] = "query_group"
    query: str = column("item.query", "column with a number that prompts asking the same have in common")
    std: Literal["sample", "population", "none"] = Field(
        "sample", description="scale: standard deviation with n - 1, with n, or none"
    )
    eps: float = Field(1e-6, ge=0, description="added to the standard deviation")

    @property
    def idle_options(self) -> Mapping[str, str]:
        """Nothing is added where nothing is divided by."""
        return {"eps": "std"} if self.std == "none" else {}
