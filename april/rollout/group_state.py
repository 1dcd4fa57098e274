"""One open group of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from april.core.group import Failure, Group, Outcome
from april.core.ids import GroupId, Version
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.rollout.queues import Rank


class GroupState:
    """One open group: its members by status, and how old its tokens are.

    Attributes:
        num_sampled: members that train; those behind them are greedy, measure the group's baseline, and are never spare.
        wanted: sampled members that must finish before the group is decided; the others of them are spare.
        longest: response tokens of the longest finished member; -1 before one has finished.
        lost: whether a member that waits has lost its engine since the group was last started.
        restarts: how often members gave up their tokens.
    """

    __slots__ = (
        "id",
        "longest",
        "losses",
        "lost",
        "num_sampled",
        "oldest_version",
        "outcomes",
        "prompt",
        "ready",
        "restarts",
        "running",
        "samples",
        "scoring",
        "spec",
        "waiting",
        "wanted",
    )

    def __init__(
        self,
        group: GroupId,
        prompt: Prompt,
        spec: SamplingSpec,
        size: int,
        *,
        wanted: int | None = None,
        budgets: Sequence[int] | None = None,
        greedy: int = 0,
    ) -> None:
        self.id, self.prompt, self.spec = group, prompt, spec
        self.wanted = size if wanted is None else wanted
        self.num_sampled = size - greedy
        specs = [spec] * self.num_sampled
        if budgets is not None:
            specs = [replace(spec, max_new_tokens=min(spec.max_new_tokens, budget)) for budget in budgets]
        specs += [replace(spec, temperature=0.0)] * greedy
        self.samples = {member: Sample(group.member(member), prompt, specs[member]) for member in range(size)}
        self.outcomes: dict[int, Outcome] = {}
        self.waiting = set(range(size))
        self.running: set[int] = set()
        self.scoring: set[int] = set()
        self.losses = dict.fromkeys(range(size), 0)
        self.oldest_version: Version | None = None
        self.ready = False
        self.longest, self.restarts, self.lost = -1, 0, False

    @property
    def complete(self) -> bool:
        """Whether every member has an outcome; derived, never stored."""
        return len(self.outcomes) == len(self.samples)

    @property
    def active(self) -> bool:
        return bool(self.running or self.scoring)

    @property
    def unfinished(self) -> list[int]:
        """Members that run or wait."""
        return sorted((*self.waiting, *self.running))

    @property
    def spare(self) -> list[int]:
        """Sampled members that run or wait though as many as are wanted have finished."""
        if self.wanted >= self.num_sampled:
            return []
        done = sum(
            m < self.num_sampled and not isinstance(self.outcomes.get(m), Failure) for m in (*self.scoring, *self.outcomes)
        )
        return [member for member in self.unfinished if member < self.num_sampled] if done >= self.wanted else []

    @property
    def rank(self) -> Rank | None:
        """Place among the groups that wait, for starting the longest first; None where nothing waits."""
        if not self.waiting:
            return None
        if self.longest >= 0:
            return 2, -self.longest
        return (0, 0) if 0 in self.waiting else (1, 0)

    def to_group(self) -> Group:
        """The finished group."""
        members = sorted(self.samples)
        return Group(self.id, tuple(self.samples[m] for m in members), tuple(self.outcomes[m] for m in members))
