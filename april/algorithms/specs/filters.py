"""Configs of the built-in filters: which complete groups train. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, builtin


@builtin("filter", "april.algorithms.filters:zero_variance")
class ZeroVariance(Atom):
    """Drop groups whose members all agree: they give no group-relative gradient (DAPO dynamic sampling)."""

    info: ClassVar[Info] = Info(
        paper="DAPO (arXiv 2503.14476), section 3.2",
        formula="keep a group iff 0 < #correct < G",
        golden=("dapo_dynamic_sampling_mask",),
    )
    type: Literal["zero_variance"] = "zero_variance"
    by: Literal["correct", "reward"] = Field("correct", description="what must differ: solved or not, or the reward itself")
