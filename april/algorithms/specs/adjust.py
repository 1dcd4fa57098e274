"""Configs of the built-in changes to the advantage. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, builtin


@builtin("adjust", "april.algorithms.advantages.adjust:whiten")
class Whiten(Atom):
    """Zero mean and unit variance over all maskable tokens of the batch (REINFORCE++)."""

    info: ClassVar[Info] = Info(
        paper="REINFORCE++ (arXiv 2501.03262)",
        formula="(A - mean) / sqrt(var + eps) over the batch",
        golden=("reinforce_pp_baseline_advantage",),
    )
    type: Literal["whiten"] = "whiten"
    eps: float = Field(1e-8, ge=0, description="added to the variance")
    shift: bool = Field(True, description="subtract the mean; false only scales")
