import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from april.core.errors import CheckpointError, DataError
from april.core.prompt import Prompt
from april.selection.sampler import PromptSampler


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", [1]) for i in range(count)]


def nothing_open(_: str) -> bool:
    return False


def test_every_prompt_comes_once_an_epoch_and_epochs_differ() -> None:
    sampler = PromptSampler(prompts(20), seed=5)
    epochs = [[(epoch, prompt.id) for epoch, prompt in sampler.next(20, nothing_open)] for _ in range(2)]
    orders = [[name for _, name in epoch] for epoch in epochs]
    assert [{number for number, _ in epoch} for epoch in epochs] == [{0}, {1}]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(f"p{i}" for i in range(20))
    assert orders[0] != orders[1] and orders[0] != [f"p{i}" for i in range(20)]


def test_it_crosses_the_end_of_an_epoch() -> None:
    sampler = PromptSampler(prompts(6), seed=0)
    first = sampler.next(4, nothing_open)
    second = sampler.next(4, nothing_open)
    assert [epoch for epoch, _ in first + second] == [0] * 6 + [1] * (len(second) - 2)
    assert sampler.epoch == (4 + len(second)) / 6


def test_an_open_prompt_keeps_its_turn_and_nothing_waits_for_it() -> None:
    order = [prompt.id for _, prompt in PromptSampler(prompts(10), seed=2).next(10, nothing_open)]
    sampler = PromptSampler(prompts(10), seed=2)
    got = sampler.next(5, lambda name: name == order[3])
    assert [prompt.id for _, prompt in got] == [*order[:3], *order[4:6]]
    assert [prompt.id for _, prompt in sampler.next(1, lambda name: name == order[3])] == [order[6]]
    assert [(epoch, prompt.id) for epoch, prompt in sampler.next(2, nothing_open)] == [(0, order[3]), (0, order[7])]


def test_the_cursor_stays_where_it_is_while_every_prompt_is_open() -> None:
    sampler = PromptSampler(prompts(5), seed=2)
    sampler.next(3, nothing_open)
    before = sampler.state_dict()
    assert sampler.next(2, lambda _: True) == []
    assert sampler.state_dict() == before


def test_a_prompt_that_stays_open_for_epochs_gets_every_turn_later() -> None:
    sampler = PromptSampler(prompts(4), seed=3)
    for _ in range(5):
        assert [prompt.id for _, prompt in sampler.next(3, lambda name: name == "p2")].count("p2") == 0
    late = [sampler.next(1, nothing_open)[0] for _ in range(5)]
    assert [(epoch, prompt.id) for epoch, prompt in late[:4]] == [(0, "p2"), (1, "p2"), (2, "p2"), (3, "p2")]


@pytest.mark.parametrize(("size", "count"), [(6, 4), (7, 4), (5, 4), (4, 4), (7, 3)])
def test_epochs_meet_without_a_gap(size: int, count: int) -> None:
    """Batches of `count` from `size` prompts are always full, although one batch may hold the end and the start of an epoch."""
    sampler = PromptSampler(prompts(size), seed=1)
    given = [sampler.next(count, nothing_open) for _ in range(4 * size)]
    assert {len(batch) for batch in given} == {count}
    assert all(len({prompt.id for _, prompt in batch}) == count for batch in given)
    used = [prompt.id for batch in given for _, prompt in batch]
    assert max(used.count(p.id) for p in prompts(size)) - min(used.count(p.id) for p in prompts(size)) <= 2


def test_one_call_never_gives_a_prompt_twice() -> None:
    sampler = PromptSampler(prompts(3), seed=1)
    got = [prompt.id for _, prompt in sampler.next(50, nothing_open)]
    assert len(got) == len(set(got)) <= 3 and len(got) >= 3


def test_a_single_prompt_is_enough() -> None:
    sampler = PromptSampler(prompts(1))
    assert [sampler.next(4, nothing_open)[0][0] for _ in range(3)] == [0, 1, 2]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 12), counts=st.lists(st.integers(0, 7), max_size=12), cut=st.integers(0, 12))
def test_a_saved_cursor_continues_the_same_order(size: int, counts: list[int], cut: int) -> None:
    whole, first = PromptSampler(prompts(size), 9), PromptSampler(prompts(size), 9)
    expected = [(epoch, p.id) for count in counts for epoch, p in whole.next(count, nothing_open)]
    got = [(epoch, p.id) for count in counts[:cut] for epoch, p in first.next(count, nothing_open)]
    resumed = PromptSampler(prompts(size), 9)
    resumed.load_state_dict(first.state_dict())
    got += [(epoch, p.id) for count in counts[cut:] for epoch, p in resumed.next(count, nothing_open)]
    assert got == expected


def test_a_cursor_of_another_data_set_is_refused() -> None:
    state = PromptSampler(prompts(5)).state_dict()
    assert state == {"epoch": 0, "position": 0, "deferred": [], "num_prompts": 5}
    with pytest.raises(CheckpointError, match="another data set") as info:
        PromptSampler(prompts(6)).load_state_dict(state)
    assert "of 5 prompts" in str(info.value) and "over 6 prompts" in str(info.value)
    with pytest.raises(CheckpointError):
        PromptSampler(prompts(5)).load_state_dict(state | {"position": 6})


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        PromptSampler([])
    assert PromptSampler(prompts(1)).epoch == 0


def asking(*questions: int | None) -> list[Prompt]:
    return [Prompt(f"p{i}", [1], item={} if query is None else {"query": query}) for i, query in enumerate(questions)]


def test_prompts_of_one_question_come_one_after_another() -> None:
    data = asking(1, 2, 3, 1, 2, None, 3, 1, None)
    sampler = PromptSampler(data, seed=1, together="query")
    orders = [[prompt.item.get("query") for _, prompt in sampler.next(9, nothing_open)] for _ in range(6)]
    for order in orders:
        assert sorted(map(str, order)) == sorted(str(prompt.item.get("query")) for prompt in data)
        for query in (1, 2, 3):
            at = [place for place, found in enumerate(order) if found == query]
            assert at == list(range(at[0], at[0] + len(at)))
    assert len({tuple(order) for order in orders}) > 1
    apart = PromptSampler(data, seed=1)
    mixed = [[prompt.item.get("query") for _, prompt in apart.next(9, nothing_open)] for _ in range(6)]
    assert any(abs(order.index(2) - (8 - order[::-1].index(2))) > 1 for order in mixed), "a shuffled data set keeps them apart"


def test_a_cursor_over_questions_is_restored() -> None:
    data = asking(1, 2, 3, 1, 2, 3)
    sampler, other = PromptSampler(data, seed=4, together="query"), PromptSampler(data, seed=4, together="query")
    sampler.next(8, nothing_open)
    other.load_state_dict(sampler.state_dict())
    assert [p.id for _, p in other.next(6, nothing_open)] == [p.id for _, p in sampler.next(6, nothing_open)]
