"""How old data may get, by counting groups.

Lag of a token = version of the weights an update starts from, minus the version that sampled the token; so the time that a
finished group waits counts, too. A batch takes N groups. Two facts bound the lag by L:

Admission. At most (L + 1) N groups may be open. One step takes N of them, so with more some group would have to wait
L + 1 steps after its first token.

Deadlines. A group whose oldest token is of version u must be trained at version u + L at the latest. With c(d) open
groups due at version d or before, and the present version v, a schedule can meet all deadlines exactly when
c(d) <= (d - v + 1) N for every d. It stays so when, for every d, the batch contains at least

    need(d) = c(d) - (d - v) N

groups that are due at d or before: that leaves c(d) <= (d - v) N, the condition at version v + 1. Which of them does not
matter, so those that are ready are taken, and the batch waits only while there are fewer of them than needed. Groups that
start later are due at v + 1 + L, where admission gives the bound. Filtered and failed groups only lower c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from april.core.ids import GroupId, SampleId, Version
from april.rollout.queues import Age
from april.rollout.view import Plan, View

OverAge = Literal["mask_tokens", "drop_group", "finish_first"]
OVER_AGE_HELP = (
    "what becomes of data at the bound: finish_first waits for it, drop_group evicts it, mask_tokens trains the group without "
    "its old tokens"
)


def admissible(num_groups: int, groups_per_step: int, max_lag_steps: int) -> int:
    """How many more groups may be opened.

    Args:
        num_groups: open groups, those in training included.
    """
    return max(0, (max_lag_steps + 1) * groups_per_step - num_groups)


def needs(ages: Sequence[Age], version: Version, groups_per_step: int | None, max_lag_steps: int) -> list[tuple[Version, int]]:
    """For each age, how many groups of that version or older the batch trained at `version` must contain.

    Args:
        ages: open groups by the version of their oldest token, ascending.
        version: weights that the batch is trained from.
        groups_per_step: size of every batch; None where a batch may take any number of groups.

    Returns:
        (oldest version, need) pairs, ascending, for ages that need any.
    """
    out: list[tuple[Version, int]] = []
    total = 0
    for age in ages:
        total += age.num_groups
        left_steps = age.version + max_lag_steps - version
        if groups_per_step is None:
            need = total if left_steps <= 0 else 0
        else:
            need = total - left_steps * groups_per_step
        if need > 0:
            out.append((age.version, need))
    return out


def shortfalls(
    ages: Sequence[Age], version: Version, groups_per_step: int | None, max_lag_steps: int
) -> list[tuple[Version, int]]:
    """Of these needs, what the ready groups cannot meet: (oldest version, missing groups) pairs."""
    ready = {age.version: sum(other.num_ready for other in ages if other.version <= age.version) for age in ages}
    wanted = needs(ages, version, groups_per_step, max_lag_steps)
    return [(oldest, need - ready[oldest]) for oldest, need in wanted if need > ready[oldest]]


def over_age(view: View, max_lag_steps: int) -> tuple[GroupId, ...]:
    """Groups with a token that an update at the present version would see with more than the allowed lag."""
    old = [age.version for age in view.ages() if view.version - age.version > max_lag_steps]
    return tuple(group for version in old for group in view.groups_of(version))


@dataclass(frozen=True, slots=True)
class Bound:
    """A promised lag, and what becomes of data that reaches it: the part that all schedules with a bound share.

    Attributes:
        max_lag_steps: the largest lag of a trained token, in updates.
        over_age: finish first, drop the group, or mask its old tokens.
        whole_batches: whether each batch takes exactly `groups_per_step` groups, or any number.
    """

    max_lag_steps: int
    over_age: OverAge
    whole_batches: bool = True

    @property
    def max_token_lag(self) -> int | None:
        """With which lag tokens give no gradient; None: all do."""
        return self.max_lag_steps if self.over_age == "mask_tokens" else None

    def admissible(self, view: View) -> int:
        """How many more groups may be issued, so that none has to wait past the bound."""
        return admissible(view.num_groups + view.num_training_groups, view.groups_per_step, self.max_lag_steps)

    def stale(self, view: View) -> tuple[GroupId, ...]:
        """Groups that are past the bound and must not be started, with drop_group."""
        return over_age(view, self.max_lag_steps) if self.over_age == "drop_group" else ()

    def drop(self, view: View, reason: str = "over the lag bound") -> Plan:
        """Evict what is past the bound; what of it runs is parked first, what is being judged goes when its outcome is there."""
        stale = self.stale(view)
        if running := tuple(sample for group in stale for sample in view.running_in(group)):
            return Plan(park=running)
        return Plan(evict=tuple((group, reason) for group in stale if not view.is_active(group)))

    def missing(self, view: View) -> list[tuple[Version, int]]:
        """What must become ready before a batch may be cut; empty unless it is finished first."""
        if self.over_age != "finish_first":
            return []
        return shortfalls(view.ages(), view.version, self._size(view), self.max_lag_steps)

    def late_samples(self, view: View) -> tuple[SampleId, ...]:
        """Waiting samples of groups that a batch waits for."""
        missing = self.missing(view)
        if not missing or not view.num_waiting_groups:
            return ()
        newest, count = missing[-1][0], max(count for _, count in missing)
        ages = ((view.oldest_version(group), group) for group in view.waiting_groups())
        late = sorted((oldest, group) for oldest, group in ages if oldest is not None and oldest <= newest)
        return tuple(sample for _, group in late[:count] for sample in view.waiting_samples(group))

    def choose(self, view: View, ready: Sequence[GroupId]) -> tuple[GroupId, ...]:
        """The groups of a batch: as many that are due as it needs, then the first of `ready`, in the order given."""
        size = self._size(view)
        if size is None:
            return tuple(ready)
        chosen: dict[GroupId, None] = {}
        if self.over_age == "finish_first":
            for version, need in needs(view.ages(), view.version, size, self.max_lag_steps):
                due = (g for g in ready if g not in chosen and (u := view.oldest_version(g)) is not None and u <= version)
                while len(chosen) < min(need, size) and (group := next(due, None)) is not None:
                    chosen[group] = None
        for group in ready:
            if len(chosen) >= size:
                break
            chosen[group] = None
        return tuple(chosen)

    def _size(self, view: View) -> int | None:
        return view.groups_per_step if self.whole_batches else None
