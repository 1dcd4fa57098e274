"""How old data may get, by counting groups.

Lag of a token = version of the weights an update starts from, minus the version that sampled the token. A batch takes
N groups. Two facts bound the lag by L:

Admission. At most (L + 1) N groups may be open. One step takes N of them, so with more some group would have to wait
L + 1 steps after its first token.

Deadlines. A group whose oldest token is of version u must be trained at version u + L at the latest. With c(d) open
groups due at version d or before, and the present version v, a schedule that always takes the earliest due groups first can
meet all deadlines exactly when c(d) <= (d - v + 1) N for every d. It stays so when each batch contains at least

    max over d >= v of  c(d) - (d - v) N

of the earliest due groups: that leaves c(d) <= (d - v) N, the condition at version v + 1; groups that start later are due
at v + 1 + L, where admission gives the bound. Filtered and failed groups only lower c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from april.core.ids import GroupId, Version

OverAge = Literal["mask_tokens", "drop_group", "finish_first"]


def admissible(num_groups: int, groups_per_step: int, max_lag_steps: int) -> int:
    """How many more groups may be opened."""
    return max(0, (max_lag_steps + 1) * groups_per_step - num_groups)


def due_now(
    by_version: Mapping[Version, tuple[GroupId, ...]], version: Version, groups_per_step: int, max_lag_steps: int
) -> tuple[GroupId, ...]:
    """The groups that the batch trained at `version` must contain so that no token ever passes the bound.

    Args:
        by_version: open groups by the version of their oldest token, versions ascending.
    """
    ordered: list[GroupId] = []
    required = 0
    for oldest, groups in by_version.items():
        ordered.extend(groups)
        required = max(required, len(ordered) - (oldest + max_lag_steps - version) * groups_per_step)
    return tuple(ordered[: max(0, required)])


def over_age(by_version: Mapping[Version, tuple[GroupId, ...]], version: Version, max_lag_steps: int) -> tuple[GroupId, ...]:
    """Groups with a token that an update at `version` would see with more than the allowed lag."""
    return tuple(group for oldest, groups in by_version.items() if version - oldest > max_lag_steps for group in groups)
