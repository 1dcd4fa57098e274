"""Prompt, segment, sample, group: what they refuse, and what they derive."""

from __future__ import annotations

import numpy as np
import pytest
from rollout_helpers import make_prompts, make_segment

from april.core.errors import DataError
from april.core.group import Failure, Group, Reward
from april.core.ids import NO_VERSION, GroupId, SampleId
from april.core.prompt import Prompt, frozen_array
from april.core.sample import Parent, Sample, Segment, Span, repeated
from april.core.sampling import SamplingSpec

PROMPT = make_prompts(1)[0]
SPEC = SamplingSpec(max_new_tokens=8)
GROUP = GroupId(3, 1, "p0")


def empty(member: int = 0, spec: SamplingSpec = SPEC) -> Sample:
    return Sample(GROUP.member(member), PROMPT, spec)


def test_ids_print_their_address_and_sort_by_age() -> None:
    """Invariant 1: an immutable id."""
    assert str(GROUP) == "g3/e1/p0"
    assert str(GROUP.member(2)) == "g3/e1/p0/m2"
    assert str(SampleId(3, 1, "p0", 2, "0.1")) == "g3/e1/p0/m2/0.1"
    assert GROUP.member(2).group == GROUP
    assert sorted([GroupId(10, 0, "a"), GroupId(2, 1, "z")])[0].serial == 2
    with pytest.raises(AttributeError):
        GROUP.serial = 4  # type: ignore[misc]


def test_the_worked_example_of_the_module() -> None:
    """Invariants 8 and 9: five tokens cut once; all columns aligned, versions per token."""
    first = Segment(np.array([7, 3, 9]), np.array([-0.2, -1.0, -0.5]), 4)
    second = Segment(np.array([4, 1]), np.array([-0.1, -0.3]), 5)
    sample = empty().extended(first).extended(second).finished("eos")
    assert sample.token_ids.tolist() == [7, 3, 9, 4, 1]
    assert sample.versions.tolist() == [4, 4, 4, 5, 5]
    assert sample.spans == (Span(0, 3, 4), Span(3, 5, 5))
    assert sample.loss_mask.tolist() == [True] * 5
    assert (len(sample), sample.num_segments, sample.oldest_version, sample.remaining_tokens) == (5, 2, 4, 3)
    np.testing.assert_allclose(sample.behaviour_logprobs, [-0.2, -1.0, -0.5, -0.1, -0.3], rtol=1e-6)


@pytest.mark.parametrize("column", ["logprobs", "entropies"])
def test_a_segment_with_columns_of_different_length_is_refused(column: str) -> None:
    """Invariant 8."""
    columns = {"token_ids": np.arange(3), "logprobs": np.full(3, -1.0), "entropies": np.ones(3)}
    assert len(Segment(version=0, **columns)) == 3
    columns[column] = columns[column][:2]
    with pytest.raises(DataError, match="differ in length"):
        Segment(version=0, **columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": np.ones(1, bool)}, "differ in length"),
        ({"behaviour_logprobs": np.array([-1.0, np.nan])}, "not a log-prob"),
        ({"behaviour_logprobs": np.array([-1.0, 0.01])}, "not a log-prob"),
        ({"spans": (Span(0, 1, 0),)}, "do not cover the response"),
        ({"spans": (Span(0, 1, 0), Span(0, 2, 0))}, "without gaps"),
        ({"spans": (Span(0, 1, 5), Span(1, 2, 4))}, "versions decrease"),
        ({"spans": (Span(0, 2, NO_VERSION, "environment"),)}, "cannot be trained on"),
        ({"spec": SamplingSpec(max_new_tokens=1)}, "longer than its budget"),
    ],
)
def test_a_sample_that_breaks_its_promise_is_refused(change: dict[str, object], message: str) -> None:
    """Invariants 8, 9 and 12: the columns, the spans and the budget are checked wherever a sample is made."""
    good = {
        "id": GROUP.member(0),
        "prompt": PROMPT,
        "spec": SPEC,
        "token_ids": np.array([1, 2]),
        "behaviour_logprobs": np.array([-1.0, -1.0]),
        "loss_mask": np.ones(2, bool),
        "spans": (Span(0, 2, 0),),
    }
    assert len(Sample(**good)) == 2
    with pytest.raises(DataError, match=message):
        Sample(**(good | change))


def test_environment_tokens_have_no_version_and_no_gradient() -> None:
    """Invariant 9."""
    sample = Sample(
        GROUP.member(0),
        PROMPT,
        SPEC,
        np.array([1, 2, 3]),
        np.array([-1.0, 0.0, -1.0]),
        np.array([True, False, True]),
        (Span(0, 1, 2), Span(1, 2, NO_VERSION, "environment"), Span(2, 3, 3)),
    )
    assert sample.versions.tolist() == [2, NO_VERSION, 3]
    assert (sample.oldest_version, sample.num_segments) == (2, 2)


def test_the_budget_counts_all_segments_together() -> None:
    """Invariant 12: never reset, never negative."""
    sample = empty()
    for version in range(4):
        sample = sample.extended(make_segment(2, version))
    assert sample.remaining_tokens == 0
    with pytest.raises(DataError, match="budget"):
        sample.extended(make_segment(1, 4))


def test_nothing_follows_the_end() -> None:
    """Invariant 14."""
    with pytest.raises(DataError, match="cannot grow"):
        empty().extended(make_segment(1)).finished("eos").extended(make_segment(1))
    assert empty().finished("length").stop == "length"


def test_adjacent_segments_of_one_origin_are_one_span_and_others_are_not() -> None:
    """Invariant 9: a cut under unchanged weights leaves no trace; another version or sampler does."""
    cut = empty().extended(make_segment(2)).extended(make_segment(3, first=2))
    whole = empty().extended(make_segment(5))
    assert cut.spans == whole.spans == (Span(0, 5, 0, "sampled", "test"),)
    assert cut.token_ids.tolist() == whole.token_ids.tolist()
    other = cut.extended(Segment(np.array([9]), np.array([-1.0]), 0, "another"))
    assert len(other.spans) == 2


def test_an_empty_segment_changes_nothing() -> None:
    """Invariant 15."""
    sample = empty().extended(make_segment(2))
    assert sample.extended(make_segment(0, version=7)) is sample


def test_entropies_are_nan_where_they_were_not_recorded() -> None:
    late = Segment(np.array([5]), np.array([-1.0]), 0, "", np.array([0.7]))
    sample = empty().extended(make_segment(2)).extended(late)
    assert sample.entropies is not None
    np.testing.assert_allclose(sample.entropies, [np.nan, np.nan, 0.7], rtol=1e-6)
    assert sample.extended(make_segment(1)).entropies is None


def test_arrays_are_frozen_and_copied_from_their_source() -> None:
    """Invariant 10: a behaviour log-prob is never overwritten, neither through the sample nor through the source array."""
    source = np.array([-1.0, -2.0], np.float32)
    segment = Segment(np.array([1, 2]), source, 0)
    sample = empty().extended(segment)
    source[0] = -9.0
    assert segment.logprobs.tolist() == [-1.0, -2.0]
    for array in (segment.logprobs, sample.behaviour_logprobs, sample.token_ids, sample.loss_mask, PROMPT.token_ids):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(DataError, match="one axis"):
        frozen_array([[1, 2]], np.int32)


def test_the_sampling_spec_is_frozen_with_the_sample() -> None:
    """Invariant 11."""
    sample = empty().extended(make_segment(1))
    assert sample.spec is SPEC
    with pytest.raises(AttributeError):
        SPEC.temperature = 0.5  # type: ignore[misc]


def test_a_fork_shares_a_prefix_and_has_its_own_name() -> None:
    parent = empty().extended(make_segment(3, version=1)).extended(make_segment(2, version=2, first=3)).finished("eos")
    child = parent.forked(4, "0")
    assert child.token_ids.tolist() == [0, 1, 2, 3]
    assert child.spans == (Span(0, 3, 1, "reused", "test"), Span(3, 4, 2, "reused", "test"))
    assert (child.stop, child.parent, child.id.branch) == (None, Parent(parent.id, 4), "0")
    assert child.forked(0, "2").id.branch == "0.2"
    assert len(child.forked(0, "2")) == 0
    assert parent.stop == "eos"
    assert len(parent) == 5
    for position in (-1, 6):
        with pytest.raises(DataError, match="outside the response"):
            parent.forked(position, "0")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("stop_strings", ("",)),
    ],
)
def test_sampling_parameters_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(DataError, match=rf"sampling\.{field}"):
        SamplingSpec(**({"max_new_tokens": 4} | {field: value}))


def test_truncates_says_whether_the_distribution_is_cut() -> None:
    assert not SamplingSpec(4).truncates
    assert SamplingSpec(4, top_p=0.9).truncates
    assert SamplingSpec(4, top_k=5).truncates


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="no tokens"):
        Prompt("p", np.zeros(0, np.int32))


def finished(member: int, group: GroupId = GROUP, prompt: Prompt = PROMPT) -> Sample:
    return Sample(group.member(member), prompt, SPEC).extended(make_segment(2)).finished("eos")


def test_a_group_is_whole_and_of_one_prompt() -> None:
    """Invariant 6: exactly its members, in order, none of another epoch or issue of the same prompt."""
    reward, failure = Reward(1.0), Failure("lost")
    group = Group(GROUP, (finished(0), empty(1)), (reward, failure))
    assert [sample.id.member for sample, _ in group.rewarded] == [0]
    assert group.prompt is PROMPT
    wrong: list[tuple[tuple[Sample, ...], tuple[Reward | Failure, ...]]] = [
        ((), ()),
        ((finished(0),), (reward, reward)),
        ((finished(1), finished(0)), (reward, reward)),
        ((finished(0), finished(1, GROUP._replace(epoch=2))), (reward, reward)),
        ((finished(0), finished(1, GROUP._replace(serial=9))), (reward, reward)),
        ((finished(0), empty(1)), (reward, reward)),
    ]
    for samples, outcomes in wrong:
        with pytest.raises(DataError):
            Group(GROUP, samples, outcomes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_is_finite(value: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        Reward(value)
    assert Reward(-2.5).value == -2.5


def test_repeated_numbers_are_one_array_for_each_length() -> None:
    """Read-only and of stride 0; another number, type or length is another array."""
    five = repeated(np.zeros(1, np.int32), 5)
    assert five is repeated(np.zeros(3, np.int32), 5) and five.strides == (0,) and not five.flags.writeable
    assert repeated(np.ones(1, np.int32), 5).tolist() == [1] * 5
    assert repeated(np.ones(1, np.bool_), 5).dtype == np.bool_ and len(repeated(np.zeros(1, np.int32), 7)) == 7


def test_what_a_change_brings_in_is_read_only() -> None:
    sample = Sample(GroupId(0, 0, "p0").member(0), make_prompts(1)[0], SamplingSpec(max_new_tokens=9))
    grown = sample.extended(Segment(np.array([4, 5]), np.array([-1.0, -2.0]), 0)).extended(
        Segment(np.array([6]), np.array([-1.0]), 0)
    )
    columns = (grown.token_ids, grown.behaviour_logprobs, grown.loss_mask)
    assert grown.token_ids.tolist() == [4, 5, 6] and not any(column.flags.writeable for column in columns)
