"""What was achieved: rewards, failures and complete groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from april.core.errors import DataError
from april.core.ids import GroupId, Version
from april.core.prompt import Prompt
from april.core.sample import Sample


@dataclass(frozen=True, slots=True)
class Reward:
    """The judgement of one finished sample.

    Attributes:
        value: what the learner maximises; finite.
        correct: whether the problem counts as solved in accuracies.
        parts: named components, for reports.
    """

    value: float
    correct: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise DataError("a reward is not finite", got=self.value, expected="a finite number")


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that ended without a reward, and why."""

    reason: str


Outcome = Reward | Failure


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """All samples of one prompt, each with its outcome.

    Attributes:
        id: the group.
        samples: the G members in order; all finished, or failed.
        outcomes: a reward or a failure for each.

    Raises:
        DataError: when members are missing, mixed between groups, or unfinished without a failure.
    """

    id: GroupId
    samples: tuple[Sample, ...]
    outcomes: tuple[Outcome, ...]

    def __post_init__(self) -> None:
        if not self.samples or len(self.samples) != len(self.outcomes):
            raise DataError(
                "a group needs one outcome a sample", where=str(self.id), got=f"{len(self.samples)} / {len(self.outcomes)}"
            )
        for index, (sample, outcome) in enumerate(zip(self.samples, self.outcomes, strict=True)):
            if sample.id.group != self.id or sample.id.member != index or sample.prompt.id != self.id.prompt:
                raise DataError("a sample is in the wrong place of a group", where=str(self.id), got=str(sample.id))
            if sample.stop is None and not isinstance(outcome, Failure):
                raise DataError("an unfinished sample has a reward", where=str(sample.id))

    @property
    def prompt(self) -> Prompt:
        """The prompt that all members answer."""
        return self.samples[0].prompt

    @property
    def sampled(self) -> Group:
        """The group without the greedy members at its end, which measure a baseline; itself where all or none are greedy."""
        kept = sum(not sample.spec.greedy for sample in self.samples)
        return Group(self.id, self.samples[:kept], self.outcomes[:kept]) if 0 < kept < len(self.samples) else self

    @property
    def rewarded(self) -> tuple[tuple[Sample, Reward], ...]:
        """The members that have a reward."""
        pairs = zip(self.samples, self.outcomes, strict=True)
        return tuple((sample, outcome) for sample, outcome in pairs if isinstance(outcome, Reward))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one update trains on.

    Attributes:
        step: number of the update, from 0.
        version: weights that the update starts from; the lag of a token is `version` minus its own version.
        groups: complete groups, oldest first.
        max_token_lag: tokens older than this many versions give no gradient; None trains all.
    """

    step: int
    version: Version
    groups: tuple[Group, ...]
    max_token_lag: int | None = None
