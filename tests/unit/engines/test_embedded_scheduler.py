"""Queue, admission and preemption: pure decisions."""

from __future__ import annotations

import numpy as np
import pytest

from april.core.errors import EngineError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded.scheduler import Request, Room, WaitingQueue, capacity_classes, choose_preempted, class_for
from april.engines.embedded.slots import SlotTable
from april.engines.embedded.stops import completes_stop, window_tokens

CLASSES = (64, 96, 128, 192, 256)


def _request(serial: int, num_prompt: int, **spec: object) -> Request:
    prompt = Prompt(f"p{serial}", np.arange(1, num_prompt + 1))
    sample = Sample(GroupId(serial, 0, prompt.id).member(0), prompt, SamplingSpec(**({"max_new_tokens": 50} | spec)))  # type: ignore[arg-type]
    return Request(serial, sample, prompt.token_ids, 50)


def prefix(request: Request) -> int:
    return len(request.context) - 1


def _queue(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue()
    for request in requests:
        queue.add(request)
    return queue


def test_classes_grow_by_half_or_a_third_and_end_at_the_limit() -> None:
    assert capacity_classes(300) == (64, 96, 128, 192, 256, 300)
    assert capacity_classes(256) == CLASSES
    assert capacity_classes(20) == (20,)
    assert [class_for(n, CLASSES) for n in (1, 64, 65, 256)] == [64, 64, 96, 256]
    with pytest.raises(EngineError, match="longer than any row"):
        class_for(257, CLASSES)


def test_the_queue_keeps_the_order_of_submission() -> None:
    queue = _queue(*(_request(serial, 10) for serial in (4, 1, 3)))
    assert [request.serial for request in queue] == [1, 3, 4]
    queue.add(_request(2, 10))
    gone = queue.remove({_request(3, 10).id})
    assert [request.serial for request in gone] == [3] and [request.serial for request in queue] == [1, 2, 4]


@pytest.mark.parametrize(
    ("room", "admitted"),
    [
        (Room(rows=2, kv_tokens=10_000, prefill_tokens=10_000), [0, 1]),
        (Room(rows=9, kv_tokens=64 + 96, prefill_tokens=10_000), [0, 1]),
        (Room(rows=9, kv_tokens=64 + 95, prefill_tokens=10_000), [0]),
        (Room(rows=9, kv_tokens=10_000, prefill_tokens=39 + 79), [0, 1]),
        (Room(rows=9, kv_tokens=10_000, prefill_tokens=1), [0]),
        (Room(rows=9, kv_tokens=63, prefill_tokens=10_000), []),
    ],
)
def test_admission_stays_within_every_budget_and_never_overtakes(room: Room, admitted: list[int]) -> None:
    queue = _queue(_request(0, 40), _request(1, 80), _request(2, 10), _request(3, 10))
    assert [request.serial for request in queue.admit(room, CLASSES, prefix)] == admitted
    assert len(queue) == 4 - len(admitted)


def test_what_needs_no_prefill_is_admitted_beside_what_does() -> None:
    costs = {0: 39, 1: 0, 2: 9, 3: 0}
    queue = _queue(_request(0, 40), _request(1, 80), _request(2, 10), _request(3, 10))
    found = queue.admit(Room(9, 10_000, 39), CLASSES, lambda request: costs[request.serial])
    assert [request.serial for request in found] == [0, 1]


def test_a_drain_admits_only_those_it_waits_for() -> None:
    first, second, third = (_request(serial, 10) for serial in range(3))
    second.must_finish = True
    queue = _queue(first, second, third)
    assert queue.admit(Room(9, 999, 999), CLASSES, prefix, only=lambda request: request.must_finish) == [second]
    assert [request.serial for request in queue] == [0, 2]


def test_the_youngest_are_preempted_until_the_rest_fits() -> None:
    assert choose_preempted([5, 7, 6], [64, 64, 64], [32, 0, 0], 224) == []
    assert choose_preempted([5, 7, 6], [64, 64, 64], [32, 0, 0], 223) == [1]
    assert choose_preempted([5, 7, 6], [64, 64, 64], [32, 0, 0], 100) == [1, 2]
    assert choose_preempted([5, 7], [64, 64], [0, 32], 128) == [1]


def test_slots_record_tokens_and_say_who_ends() -> None:
    table = SlotTable(4, 3)
    plain, eos = _request(0, 5), _request(1, 7, stop_token_ids=(9, 11))
    plain.limit_tokens = 2
    slots = np.array([table.open(plain), table.open(eos)])
    ended, limited = table.record(slots, np.array([9, 8]), np.array([-1.0, -2.0]), None)
    assert ended.tolist() == [] and limited.tolist() == []
    ended, limited = table.record(slots, np.array([3, 11]), np.array([-3.0, -4.0]), None)
    assert ended.tolist() == [slots[1]] and limited.tolist() == [slots[0]]
    segment = table.take_segment(int(slots[1]), 6, "here")
    assert segment is not None and segment.version == 6 and segment.entropies is None
    assert segment.token_ids.tolist() == [8, 11] and segment.logprobs.tolist() == [-2.0, -4.0]
    assert table.take_segment(int(slots[1]), 6, "here") is None
    assert eos.context.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 11]
    assert table.tail(int(slots[1]), 3).tolist() == [8, 11]
    assert table.tail(int(slots[0]), 1).tolist() == [3]
    with pytest.raises(EngineError, match="no sample"):
        table.request(int({0, 1, 2, 3}.difference(slots.tolist()).pop()))


def test_the_tail_joins_reported_and_new_tokens() -> None:
    table = SlotTable(1, 2)
    request = _request(0, 3)
    slot = np.array([table.open(request)])
    for token in (21, 22):
        table.record(slot, np.array([token]), np.array([0.0]), None)
    assert table.full(slot).tolist() == [0]
    table.take_segment(0, 0, "")
    table.record(slot, np.array([23]), np.array([0.0]), None)
    assert table.full(slot).tolist() == []
    assert table.tail(0, 2).tolist() == [22, 23] and table.tail(0, 99).tolist() == [21, 22, 23]


def _decode(ids: list[int]) -> str:
    return "".join("" if i == 0 else chr(96 + i) for i in ids)


def test_a_stop_string_counts_with_its_last_token_only() -> None:
    assert completes_stop([1, 2, 3], ["bc"], _decode)
    assert not completes_stop([1, 2, 3, 4], ["bc"], _decode)
    assert not completes_stop([1, 2, 3, 0], ["bc"], _decode)
    assert completes_stop([2, 3, 2, 3], ["bc"], _decode)
    assert completes_stop([1, 1, 1], ["x", "aa"], _decode)
    assert window_tokens(["ab", "abcd"]) == 32
