"""Configs of the built-in what wraps the optimiser step. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from april.algorithms.atoms import Atom, Info, builtin


@builtin("update", "april.algorithms.update:plain")
class PlainUpdate(Atom):
    """One ordinary optimiser step."""

    info: ClassVar[Info] = Info(
        paper="-",
        formula="one optimiser step a mini-batch",
        golden=(),
    )
    type: Literal["plain"] = "plain"
