"""The pool as a state machine against a plain model; its journal rebuilds it from any prefix; snapshots are exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rollout_helpers import SPEC, audit, make_prompts, make_segment

from april.checkpoint.codec import decode_frames, encode
from april.core.errors import LedgerError
from april.core.group import Failure, Reward
from april.core.ids import SampleId
from april.rollout.pool import Pool
from april.rollout.snapshot import load_pool_state, park_running, pool_state, replay
from april.rollout.view import Status

PROMPTS = {prompt.id: prompt for prompt in make_prompts(200)}


def exact(pool: Pool) -> bytes:
    """A pool's complete contents."""
    return encode(pool_state(pool))


class PoolMachine(RuleBasedStateMachine):
    """Random transitions; the model is one dictionary of statuses and one of token counts."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(self.listen)
        self.journal: list[bytes] = []
        self.states: list[bytes] = []
        self.model: dict[SampleId, str] = {}
        self.tokens: Counter[SampleId] = Counter()
        self.version = 0
        self.trained: list[SampleId] = []

    def listen(self, name: str, arguments: dict[str, Any]) -> None:
        self.journal.append(encode((name, arguments)))
        self.states.append(exact(self.pool))

    def some(self, data: st.DataObject, *statuses: str) -> SampleId:
        return data.draw(st.sampled_from(sorted(s for s, status in self.model.items() if status in statuses)))

    def has(self, *statuses: str) -> bool:
        return any(status in statuses for status in self.model.values())

    @rule(size=st.integers(1, 3))
    def issue(self, size: int) -> None:
        prompt = PROMPTS[f"p{self.pool.next_serial % 200}"]
        if self.pool.is_open(prompt.id):
            return
        group = self.pool.issue(self.pool.next_serial // 200, prompt, SPEC, size)
        self.model |= {group.member(member): "fresh" for member in range(size)}

    @precondition(lambda self: self.has("fresh", "parked"))
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        waiting = sorted(s for s, status in self.model.items() if status in ("fresh", "parked"))
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        assert [sample.id for sample in self.pool.start(chosen, self.version)] == chosen
        self.model |= dict.fromkeys(chosen, "running")

    @precondition(lambda self: self.has("running"))
    @rule(data=st.data(), length=st.integers(0, 4), how=st.sampled_from(["progress", "park", "lose", "finish", "fail"]))
    def run(self, data: st.DataObject, length: int, how: str) -> None:
        sample = self.some(data, "running")
        length = min(length, SPEC.max_new_tokens - self.tokens[sample])
        segment = make_segment(length, self.version, self.tokens[sample]) if length else None
        if how == "progress" and segment is not None:
            self.pool.progress(sample, segment)
        elif how == "park":
            self.pool.park(sample, segment)
            self.model[sample] = "parked"
        elif how == "lose":
            self.pool.lose(sample)
            self.model[sample], length = "parked", 0
        elif how == "finish":
            self.pool.finish(sample, segment, "eos")
            self.model[sample] = "scoring"
        elif how == "fail":
            self.pool.fail(sample, "gone")
            self.model[sample], length = "failed", 0
        self.tokens[sample] += length

    @precondition(lambda self: self.has("scoring"))
    @rule(data=st.data(), good=st.booleans())
    def judge(self, data: st.DataObject, good: bool) -> None:
        sample = self.some(data, "scoring")
        self.pool.judge(sample, Reward(0.25, True, {"part": 0.5}) if good else Failure("no answer"))
        self.model[sample] = "ready" if good else "failed"

    @precondition(lambda self: any(s.complete and not s.ready for s in self.pool.groups.values()))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        complete = [group for group, state in self.pool.groups.items() if state.complete and not state.ready]
        self.pool.keep(data.draw(st.sampled_from(complete)))

    @precondition(lambda self: any(not s.active for s in self.pool.groups.values()))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([g for g, state in self.pool.groups.items() if not state.active]))
        state = self.pool.groups[group]
        end = data.draw(st.sampled_from([Status.FILTERED, Status.FAILED] if state.complete else [Status.EVICTED]))
        self.pool.drop(group, end, "because")
        for member in state.samples:
            if self.model[group.member(member)] != "failed":
                self.model[group.member(member)] = str(end)

    @precondition(lambda self: self.pool.ready and not self.pool.training)
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(list(self.pool.ready)), min_size=1, unique=True))
        groups = self.pool.emit(chosen)
        assert [group.id for group in groups] == sorted(chosen)
        audit(self.pool)
        self.pool.trained()
        self.trained += [sample.id for group in groups for sample, _ in group.rewarded]
        self.model |= {sample.id: "trained" for group in groups for sample, _ in group.rewarded}
        self.version += 1

    @precondition(lambda self: self.has("trained", "filtered", "evicted", "fresh", "parked", "scoring"))
    @rule(data=st.data())
    def refuse_what_does_not_run(self, data: st.DataObject) -> None:
        """Negative control: tokens for a sample that does not run change nothing and leave no record."""
        sample = self.some(data, "trained", "filtered", "evicted", "fresh", "parked", "scoring")
        before, records = exact(self.pool), len(self.journal)
        for call in (lambda: self.pool.finish(sample, None, "eos"), lambda: self.pool.park(sample, None)):
            with pytest.raises(LedgerError):
                call()
        assert (exact(self.pool), len(self.journal)) == (before, records)

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        """Invariants 1, 2 and 3, and the counters that schedules see."""
        audit(self.pool)
        counts = Counter(self.model.values())
        assert {str(k): v for k, v in self.pool.ledger.counts.items() if v} == counts
        assert self.pool.ledger.issued == len(self.model)
        assert len(self.trained) == len(set(self.trained))
        open_tokens = {s.id: len(s) for state in self.pool.groups.values() for s in state.samples.values()}
        assert all(self.tokens[sample] == length for sample, length in open_tokens.items())

    def teardown(self) -> None:
        """Invariant 30: the journal rebuilds the pool at every record; a snapshot in the middle changes nothing."""
        copy = Pool()
        for index, (record, state) in enumerate(zip(self.journal, self.states, strict=True)):
            ((name, arguments),) = decode_frames(record, "journal", PROMPTS)
            replay(copy, name, arguments)
            assert exact(copy) == state, f"record {index}: {name}"
            if index % 5 == 4 and not copy.training:
                (saved,) = decode_frames(state, "snapshot", PROMPTS)
                copy = Pool()
                load_pool_state(copy, saved)
                assert exact(copy) == state
                audit(copy)
        parked = park_running(copy)
        assert parked == sum(status == "running" for status in self.model.values())
        assert copy.num_running == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=20, stateful_step_count=40)
