"""What wraps the optimiser step."""

from __future__ import annotations

from collections.abc import Callable


def plain(step: Callable[[], None]) -> None:
    """One ordinary optimiser step."""
    step()
