"""What a reward is: a callable that judges one finished sample, and the shapes that it may return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from april.core.group import Reward
from april.core.sample import Sample


class Verifier(Protocol):
    """Judges one finished sample.

    Args:
        text: the response, decoded, without special tokens.
        sample: the sample itself: tokens, versions, why it stopped.
        item: the prompt's item: question, answer, metadata.

    Returns:
        a `Reward`; or one number, which counts as correct from 1; or named parts, whose sum is the reward.
        Anything else, a number that is not finite, or an exception costs the sample.
    """

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward | float | Mapping[str, float]: ...


class WrongReward(ValueError):
    """A verifier returned something that is no reward; the message is the reason of the failure."""


def as_reward(value: object) -> Reward:
    """What a verifier returned, as a `Reward`.

    Raises:
        WrongReward: for anything but a `Reward`, one finite number, or a mapping of names to finite numbers.
    """
    if isinstance(value, Reward):
        parts = {name: _number(part, f"part {name!r}") for name, part in value.parts.items()}
        return Reward(_number(value.value, "reward"), bool(value.correct), parts)
    if isinstance(value, Mapping):
        if not value:
            raise WrongReward("reward of the wrong shape: got no parts, expected at least one")
        parts = {str(name): _number(part, f"part {name!r}") for name, part in value.items()}
        total = math.fsum(parts.values())
        return Reward(total, total >= 1, parts)
    number = _number(value, "reward")
    return Reward(number, number >= 1)


def _number(value: object, what: str) -> float:
    shape = getattr(value, "shape", None)
    if (
        value is None
        or isinstance(value, (str, bytes))
        or (shape is not None and len(shape) > 0)
        or not hasattr(value, "__float__")
    ):
        raise WrongReward(f"{what} of the wrong shape: got {_describe(value)}, expected one number")
    number = float(value)  # numbers and zero-dimensional arrays and tensors
    if not math.isfinite(number):
        raise WrongReward(f"{what} is not finite: got {number}")
    return number


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, (list, tuple, set, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


UNANSWERED = Reward(0.0, False, {"answered": 0.0})
"""The judgement of a response in which no answer was found."""


def graded(score: float, *, only_correct: bool = False) -> Reward:
    """The reward of an answer with this score: 1 is right, less is partial credit, which `only_correct` takes away."""
    correct = score >= 1
    return Reward(float(correct) if only_correct else float(score), correct, {"answered": 1.0, "score": float(score)})
