"""The pool as plain data and back; and the journal's records applied to a pool."""

from __future__ import annotations

from typing import Any

from april.core.errors import CheckpointError
from april.core.ids import GroupId
from april.rollout.forecast import LengthSums
from april.rollout.group_state import GroupState
from april.rollout.pool import WAITING, Pool
from april.rollout.view import Status

_LIFE = {"issue", "start", "progress", "park", "lose", "finish", "stop", "restart", "judge", "fail"}
REPLAYED = frozenset({*_LIFE, "keep", "drop", "emit", "trained"})


def pool_state(pool: Pool) -> dict[str, Any]:
    """Everything a pool holds, for `april.checkpoint.codec`."""
    return {
        "next_serial": pool.next_serial,
        "ledger": pool.ledger.to_dict(),
        "ready": list(pool.ready),
        "lengths": pool.lengths.to_dict(),
        "kept": pool.num_kept_groups,
        "dropped": pool.num_dropped_groups,
        "groups": [_group_state(pool, state) for state in pool.groups.values()],
    }


def _group_state(pool: Pool, state: GroupState) -> dict[str, Any]:
    members = sorted(state.samples)
    return {
        "group": state.id,
        "prompt": state.prompt,
        "spec": state.spec,
        "samples": [state.samples[member] for member in members],
        "status": [str(pool.status[state.id.member(member)]) for member in members],
        "outcomes": dict(state.outcomes),
        "losses": dict(state.losses),
        "oldest_version": state.oldest_version,
        "wanted": state.wanted,
        "greedy": len(state.samples) - state.num_sampled,
        "restarts": state.restarts,
    }


def load_pool_state(pool: Pool, saved: dict[str, Any]) -> None:
    """Fill an empty pool.

    Raises:
        CheckpointError: the parts do not add up.
    """
    for entry in saved["groups"]:
        _load_group(pool, entry)
    for group in saved["ready"]:
        pool.keep(group)
    pool.lengths = LengthSums(**saved.get("lengths", {}))
    pool.num_kept_groups, pool.num_dropped_groups = saved.get("kept", 0), saved.get("dropped", 0)
    pool.next_serial = saved["next_serial"]
    pool.ledger.load_dict(saved["ledger"])
    open_samples = sum(count for status, count in pool.ledger.counts.items() if status in _OPEN)
    held = sum(status in _OPEN for status in pool.status.values())
    if not pool.ledger.balanced or open_samples != held:
        raise CheckpointError("a saved pool does not balance", got=f"{held} samples for a ledger of {open_samples}")


_OPEN = frozenset({Status.FRESH, Status.RUNNING, Status.PARKED, Status.SCORING, Status.READY, Status.TRAINING})


def _load_group(pool: Pool, entry: dict[str, Any]) -> None:
    group: GroupId = entry["group"]
    more = {"wanted": entry.get("wanted"), "greedy": entry.get("greedy", 0)}
    state = GroupState(group, entry["prompt"], entry["spec"], len(entry["samples"]), **more)
    state.samples = dict(enumerate(entry["samples"]))
    state.restarts = entry.get("restarts", 0)
    state.longest = max((len(sample) for sample in state.samples.values() if sample.stop is not None), default=-1)
    state.outcomes, state.losses = dict(entry["outcomes"]), dict(entry["losses"])
    statuses = [Status(status) for status in entry["status"]]
    state.waiting = {member for member, status in enumerate(statuses) if status in WAITING}
    pool.add_group(state, statuses, entry["oldest_version"])


def replay(pool: Pool, name: str, arguments: dict[str, Any]) -> Any:
    """Apply one journal record to the pool; returns what the transition returns."""
    if name == "issue":
        pool.next_serial = arguments["group"].serial
        group = arguments["group"]
        more = {name: arguments[name] for name in ("wanted", "budgets", "greedy") if name in arguments}
        return pool.issue(group.epoch, arguments["prompt"], arguments["spec"], arguments["size"], **more)
    if name == "drop":
        return pool.drop(arguments["group"], Status(arguments["end"]), arguments["reason"])
    return getattr(pool, name)(**arguments)


def park_running(pool: Pool) -> int:
    """After a crash: what ran waits again, with the tokens that were written down. Returns how many samples that were."""
    samples = pool.running_samples()
    for sample in samples:
        pool.park(sample, None)
    return len(samples)
