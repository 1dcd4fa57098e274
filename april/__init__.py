"""April: reinforcement-learning post-training whose rollouts never wait for the longest one.

    import april
    result = april.train("quickstart", overrides=["steps=20"])
    scores = april.evaluate("quickstart", model=result.folder)

Names are loaded when they are first used, so that importing April costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from april.algorithms.atoms import atom
    from april.api import evaluate, export, train
    from april.config.resolve import resolve
    from april.core.errors import AprilError
    from april.core.group import Reward
    from april.observe.report import write_report

__all__ = ["AprilError", "Reward", "__version__", "atom", "evaluate", "export", "resolve", "train", "write_report"]
__version__ = "0.1.0"

_HOMES = {
    "AprilError": "april.core.errors",
    "Reward": "april.core.group",
    "atom": "april.algorithms.atoms",
    "evaluate": "april.api",
    "export": "april.api",
    "resolve": "april.config.resolve",
    "train": "april.api",
    "write_report": "april.observe.report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'april' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
