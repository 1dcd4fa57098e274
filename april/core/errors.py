"""The exception tree. Every error says where, what it got, what it expected and what to do next.

AprilError
|- RecipeError       a recipe cannot mean anything: unknown key, wrong type, options that contradict each other
|- DataError         prompts, answers, rewards or tokens that do not have the promised shape
|- ModelError        weights, tokenizer or architecture that cannot be used
|- EngineError       an engine broke its contract or cannot serve a request
|- RolloutError      the rollout machinery itself
|  |- LedgerError    a sample was lost, repeated or moved in a way that is not allowed
|  `- StallError     nothing is pending, yet the step cannot be completed
|- Interrupted       the run was asked to stop, and stopped where it can be continued
|- CheckpointError   a saved run that cannot be read or continued
|- ProcessError      a child process died, hung, or did not start
`- ResourceError     disk, memory or device that is not there
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AprilError(Exception):
    """Base of all errors that a user can act on.

    Args:
        what: one sentence that names the problem.
        where: dotted recipe path, file name or sample id.
        got: the offending value.
        expected: what would have been right.
        hint: the next thing to do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.hint = what, where, got, expected, hint
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [self.what]
        fields = (("where", self.where), ("got", self.got), ("expected", self.expected), ("next", self.hint))
        lines += [f"  {label + ':':<10}{value}" for label, value in fields if value is not None]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.got, self.expected, self.hint))


def _rebuild(
    kind: type[AprilError], what: str, where: str | None, got: object, expected: str | None, hint: str | None
) -> AprilError:
    return kind(what, where=where, got=got, expected=expected, hint=hint)


class RecipeError(AprilError):
    """A recipe that cannot mean anything."""


class DataError(AprilError):
    """Prompts, answers, rewards or tokens without the promised shape."""


class ModelError(AprilError):
    """Weights, tokenizer or architecture that cannot be used."""


class EngineError(AprilError):
    """An engine broke its contract or cannot serve a request."""


class RolloutError(AprilError):
    """The rollout machinery itself."""


class LedgerError(RolloutError):
    """A sample was lost, repeated, or moved in a way that is not allowed."""


class StallError(RolloutError):
    """Nothing is pending, yet the step cannot be completed."""


class Interrupted(AprilError):
    """The run was asked to stop, and stopped where it can be continued."""


class CheckpointError(AprilError):
    """A saved run that cannot be read or continued."""


class ProcessError(AprilError):
    """A child process died, hung, or did not start."""


class ResourceError(AprilError):
    """Disk, memory or device that is not there."""


def choice(name: str, known: Iterable[str], otherwise: str) -> dict[str, str]:
    """`expected` and `hint` for a name that is none of the known ones; `otherwise` is the hint when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    expected = "one of " + ", ".join(names) if names else "nothing; none is known"
    return {"expected": expected, "hint": f"did you mean {close[0]!r}?" if close else otherwise}


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known word, or lists them all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + (", ".join(names) if names else "none")
