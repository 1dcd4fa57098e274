"""Watches look at samples while they are generated, under any schedule: how long each may get, and which are not worth it.

A watch never touches the pool or the engine. It sets budgets when a group is issued, and returns verdicts on samples that had
news: tokens of their own, or the outcome of a sibling. The driver turns verdicts into the parts `stop` and `cut` of a plan. What
else depends on the content of generation (forks, speculation) can return other parts of a plan in the same place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from april.core.group import Outcome
from april.core.ids import SampleId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.rollout.pool import Pool
from april.rollout.view import Plan, Status


class Siblings(Protocol):
    """What a watch sees of a group: its members, and the outcomes of those that have been judged."""

    @property
    def samples(self) -> Mapping[int, Sample]: ...
    @property
    def outcomes(self) -> Mapping[int, Outcome]: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a sample ends early.

    Attributes:
        how: "stop": as if at its budget, judged and trained on; "cut": without a reward, and without gradient.
        reason: for the ledger, with "cut".
    """

    how: Literal["stop", "cut"]
    reason: str


class Watch(Protocol):
    """Ends samples early. Both answers depend on the arguments only, so that a resumed run gives them again."""

    def budgets(self, prompt: Prompt, group_size: int, max_new_tokens: int) -> Sequence[int] | None:
        """Response tokens of each member of a new group; None: as the recipe says. Frozen with the samples."""
        ...

    def look(self, sample: Sample, siblings: Siblings) -> Verdict | None:
        """What to do with a sample that is not finished; None lets it go on."""
        ...


def member_budgets(watches: Iterable[Watch], prompt: Prompt, spec: SamplingSpec, group_size: int) -> tuple[int, ...] | None:
    """The smallest budget that any watch gives each member; None when none gives any."""
    given = [budgets for watch in watches if (budgets := watch.budgets(prompt, group_size, spec.max_new_tokens)) is not None]
    return tuple(max(1, min(column)) for column in zip(*given, strict=True)) if given else None


def look_at(watches: Sequence[Watch], pool: Pool, samples: Iterable[SampleId]) -> Plan:
    """The verdicts on these samples as a plan; the first watch that gives one decides."""
    stop: list[SampleId] = []
    cut: list[tuple[SampleId, str]] = []
    for sample in samples:
        if pool.status.get(sample) not in (Status.RUNNING, Status.PARKED):
            continue
        state, held = pool.groups[sample.group], pool[sample]
        if sample.member >= state.num_sampled:  # a greedy member: nobody else measures the baseline
            continue
        verdict = next((found for watch in watches if (found := watch.look(held, state)) is not None), None)
        if verdict is None:
            continue
        if verdict.how == "cut":
            cut.append((sample, verdict.reason))
        elif len(held):
            stop.append(sample)
    return Plan(stop=tuple(stop), cut=tuple(cut))
