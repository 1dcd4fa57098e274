import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from april.core.errors import CheckpointError, DataError
from april.core.prompt import Prompt
from april.core.sampling import SamplingSpec
from april.selection.sampler import PromptSampler, new_group


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


def test_it_stops_at_the_first_open_prompt_and_comes_back_to_it() -> None:
    order = [prompt.id for _, prompt in PromptSampler(prompts(10), seed=2).next(10, nothing_open)]
    sampler = PromptSampler(prompts(10), seed=2)
    got = sampler.next(10, lambda name: name == order[3])
    assert [prompt.id for _, prompt in got] == order[:3]
    assert sampler.next(10, lambda name: name == order[3]) == []
    assert [prompt.id for _, prompt in sampler.next(2, nothing_open)] == order[3:5]


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
    assert state == {"epoch": 0, "position": 0, "num_prompts": 5}
    with pytest.raises(CheckpointError, match="another data set") as info:
        PromptSampler(prompts(6)).load_state_dict(state)
    assert "of 5 prompts" in str(info.value) and "over 6 prompts" in str(info.value)
    with pytest.raises(CheckpointError):
        PromptSampler(prompts(5)).load_state_dict(state | {"position": 6})


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        PromptSampler([])
    assert PromptSampler(prompts(1)).epoch == 0


def test_a_new_group_has_its_members_in_order() -> None:
    spec, prompt = SamplingSpec(max_new_tokens=8), prompts(1)[0]
    group = new_group(7, 2, prompt, spec, 3)
    assert [str(sample.id) for sample in group] == ["g7/e2/p0/m0", "g7/e2/p0/m1", "g7/e2/p0/m2"]
    assert all(sample.spec is spec and len(sample) == 0 and sample.stop is None for sample in group)
    with pytest.raises(DataError, match="needs members"):
        new_group(7, 2, prompt, spec, 0)
