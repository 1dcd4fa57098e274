"""The conservation law: every sample ever issued is in exactly one place."""

from __future__ import annotations

from collections import Counter
from typing import Any

from april.core.errors import LedgerError
from april.rollout.view import Status

ENDS = frozenset({Status.TRAINED, Status.FILTERED, Status.EVICTED, Status.FAILED})
ALLOWED: dict[Status, frozenset[Status]] = {
    Status.FRESH: frozenset({Status.RUNNING, Status.EVICTED, Status.FAILED}),
    Status.RUNNING: frozenset({Status.PARKED, Status.SCORING, Status.FAILED}),
    Status.PARKED: frozenset({Status.RUNNING, Status.SCORING, Status.FRESH, Status.EVICTED, Status.FAILED}),
    Status.SCORING: frozenset({Status.READY, Status.FAILED}),
    Status.READY: frozenset({Status.TRAINING, Status.FRESH, Status.FILTERED, Status.EVICTED, Status.FAILED}),
    Status.TRAINING: frozenset({Status.TRAINED}),
    **{end: frozenset() for end in ENDS},
}


class Ledger:
    """Counts of samples by status, checked on every move.

    Attributes:
        issued: samples ever created.
        counts: samples now in each status; ends only grow.
        reasons: why samples were filtered, evicted or failed, with counts.
        parked_total: how often a running sample was parked.
        resumed_total: how often a parked sample was started again.
        restarted_total: how often a sample gave up its tokens, to be generated again from nothing.
    """

    def __init__(self) -> None:
        self.issued = 0
        self.counts: dict[Status, int] = dict.fromkeys(Status, 0)
        self.reasons: Counter[str] = Counter()
        self.parked_total = 0
        self.resumed_total = 0
        self.restarted_total = 0

    def issue(self, num_samples: int) -> None:
        """Count new samples."""
        self.issued += num_samples
        self.counts[Status.FRESH] += num_samples

    def move(self, before: Status, after: Status, reason: str = "", where: object = "") -> None:
        """Count one sample's transition.

        Raises:
            LedgerError: when the transition is not one of the drawn ones.
        """
        if after not in ALLOWED[before]:
            raise LedgerError(
                "a sample made an impossible move",
                where=str(where),
                got=f"{before} -> {after}",
                expected=f"one of {sorted(ALLOWED[before])}",
            )
        self.counts[before] -= 1
        self.counts[after] += 1
        if reason:
            self.reasons[f"{after}: {reason}"] += 1
        self.parked_total += after is Status.PARKED
        self.resumed_total += before is Status.PARKED and after is Status.RUNNING
        self.restarted_total += after is Status.FRESH

    @property
    def balanced(self) -> bool:
        """Whether issued equals the sum of all places."""
        return self.issued == sum(self.counts.values()) and min(self.counts.values()) >= 0

    def check(self) -> None:
        """Raise LedgerError when a sample is lost or counted twice."""
        if not self.balanced:
            raise LedgerError("the ledger does not balance", got=self.to_dict(), expected="issued = sum of all places")

    def to_dict(self) -> dict[str, Any]:
        """For metrics and checkpoints."""
        return {
            "issued": self.issued,
            "counts": {str(status): count for status, count in self.counts.items()},
            "reasons": dict(self.reasons),
            "parked_total": self.parked_total,
            "resumed_total": self.resumed_total,
            "restarted_total": self.restarted_total,
        }

    def load_dict(self, state: dict[str, Any]) -> None:
        """Restore what `to_dict` gave."""
        self.issued = int(state["issued"])
        self.counts = {status: int(state["counts"].get(str(status), 0)) for status in Status}
        self.reasons = Counter(state["reasons"])
        self.parked_total, self.resumed_total = int(state["parked_total"]), int(state["resumed_total"])
        self.restarted_total = int(state.get("restarted_total", 0))
