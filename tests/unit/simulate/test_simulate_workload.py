"""Lengths: means, correlations, addresses, recordings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from april.core.errors import DataError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.simulate.recorded import read_lengths
from april.simulate.workload import Lengths, Tools, Workload, mean_after_cut


def sample_of(lengths: Lengths, prompt: int, member: int, epoch: int = 0, serial: int = 0) -> Sample:
    item = lengths.prompts()[prompt]
    return Sample(GroupId(serial, epoch, item.id).member(member), item, SamplingSpec(max_new_tokens=1 << 20))


@pytest.mark.parametrize("shape", [{"sigma": 0.7}, {"sigma": 1.1}, {"lengths": "pareto", "shape": 1.5}])
def test_the_mean_after_the_cut_is_what_was_asked_for(shape: dict[str, object]) -> None:
    workload = Workload(mean_tokens=5000, max_tokens=16384, num_prompts=20000, rho=0.0, **shape)  # type: ignore[arg-type]
    lengths = Lengths(workload, 0, 8)
    assert lengths.mean_tokens == pytest.approx(5000, rel=0.01)
    assert mean_after_cut(workload, lengths._scale) == pytest.approx(5000, rel=1e-6)


def test_the_mean_before_the_cut_is_lower_after_it() -> None:
    """Lognormal with sigma 1, mean 10, cap 10: place (0 + 1/2) = 0.5; 10 Phi(-0.5) + 10 (1 - Phi(0.5)) = 20 x 0.30854."""
    workload = Workload(mean_tokens=10, mean_is="before_cut", sigma=1.0, max_tokens=10)
    assert mean_after_cut(workload, 1.0) == pytest.approx(6.1708, abs=1e-4)


def test_samples_of_a_prompt_are_alike_as_far_as_rho_says() -> None:
    for rho in (0.0, 0.7):
        lengths = Lengths(Workload(rho=rho, max_tokens=10**6, num_prompts=20000), 1, 2)
        logs = np.log(lengths._tokens(0))
        assert np.corrcoef(logs.T)[0, 1] == pytest.approx(rho, abs=0.03)


def test_a_length_belongs_to_epoch_prompt_and_member_and_not_to_the_order_of_issue() -> None:
    lengths = Lengths(Workload(), 3, 4)
    first = lengths.tokens(sample_of(lengths, 5, 2, serial=0))
    assert lengths.tokens(sample_of(lengths, 5, 2, serial=99)) == first
    again = Lengths(Workload(), 3, 4)
    assert again.tokens(sample_of(again, 5, 2)) == first
    others = {lengths.tokens(sample_of(lengths, p, m, e)) for p, m, e in ((6, 2, 0), (5, 3, 0), (5, 2, 1))}
    assert first not in others and Lengths(Workload(), 4, 4).tokens(sample_of(lengths, 5, 2)) != first


def test_loops_growth_and_the_cap() -> None:
    lengths = Lengths(Workload(loop_fraction=0.2, num_prompts=5000, growth_per_epoch=0.5, sigma=0.3), 0, 4)
    assert (lengths._tokens(0) == 16384).mean() == pytest.approx(0.2, abs=0.02)
    plain = Lengths(Workload(num_prompts=5000, growth_per_epoch=0.5, sigma=0.3, mean_tokens=4000), 0, 4)
    assert plain._tokens(1).mean() / plain._tokens(0).mean() == pytest.approx(1.5, rel=0.03)
    assert plain._tokens(2).max() <= 16384
    course = lengths.course(sample_of(lengths, *map(int, np.argwhere(lengths._tokens(0) == 16384)[0])))
    assert (course.num_tokens, course.stop) == (16384, "length")


def test_long_prompts_are_hard_ones() -> None:
    lengths = Lengths(Workload(num_prompts=20000, difficulty_by_length=0.7), 0, 2)
    log = np.log(lengths._tokens(0)).mean(axis=1)
    assert np.corrcoef(log, lengths.chances)[0, 1] < -0.4
    assert lengths.chances.mean() == pytest.approx(0.5, abs=0.01)
    none = Lengths(Workload(num_prompts=20000, difficulty_by_length=0.0), 0, 2)
    assert abs(np.corrcoef(np.log(none._tokens(0)).mean(axis=1), none.chances)[0, 1]) < 0.03
    kept = [(p**8 + (1 - p) ** 8) for p in lengths.chances]
    assert 1 - np.mean(kept) == pytest.approx(0.61, abs=0.02)  # Beta(1/2, 1/2), groups of 8


def test_tools_pause_at_places_along_the_response() -> None:
    lengths = Lengths(Workload(tools=Tools(mean_turns=4, mean_s=2.0), num_prompts=2000), 0, 1)
    courses = [lengths.course(sample_of(lengths, index, 0)) for index in range(1000)]
    assert np.mean([1 + len(course.pauses) for course in courses]) == pytest.approx(4, rel=0.1)
    waits = [pause_s for course in courses for _, pause_s in course.pauses]
    assert np.mean(waits) == pytest.approx(2.0, rel=0.1)
    for course in courses:
        places = [position for position, _ in course.pauses]
        assert places == sorted(set(places)) and all(0 < place < course.num_tokens for place in places)


def test_a_recorded_run_is_replayed_sample_by_sample(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "serial": 1, "epoch": 0, "prompt": "b", "prompt_tokens": 7, "tokens": [30, 40]},
        {"step": 0, "serial": 0, "epoch": 0, "prompt": "a", "prompt_tokens": 5, "tokens": [10, 20]},
    ]
    (tmp_path / "lengths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = Lengths(Workload(lengths="recorded", path="lengths.jsonl"), 0, 2, tmp_path)
    assert [(p.id, len(p.token_ids)) for p in lengths.prompts()] == [("a", 5), ("b", 7)]
    assert [lengths.tokens(sample_of(lengths, p, m)) for p in (0, 1) for m in (0, 1)] == [10, 20, 30, 40]
    assert 10 <= lengths.tokens(sample_of(lengths, 0, 0, epoch=3)) <= 40  # not recorded: drawn from all of them
    assert lengths.mean_tokens == 25.0


def test_a_csv_gives_its_distribution(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"x,1,{n}\n" for n in (5, 5, 5, 100)))
    lengths = Lengths(Workload(lengths="recorded", path=str(file), num_prompts=5000, rho=0.0), 0, 4)
    assert (lengths._tokens(0) == 5).mean() == pytest.approx(2 / 3, abs=0.02)  # quantiles between the third and the fourth grow
    (tmp_path / "empty.csv").write_text("GeneratedTokens\n")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    for name, message in (("empty.csv", "no lengths"), ("wrong.csv", "GeneratedTokens"), ("missing", "missing")):
        with pytest.raises(DataError, match=message):
            read_lengths(str(tmp_path / name))


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="belong together"):
        Workload(path="x")
    with pytest.raises(ValueError, match="smaller than the cap"):
        Workload(mean_tokens=100, max_tokens=50)


def test_what_a_run_writes_is_what_a_simulation_reads(tmp_path: Path) -> None:
    from april.core.group import Failure, Group, Reward
    from april.core.sample import Segment
    from april.run.telemetry import lengths_of

    prompt = Prompt("p7", np.zeros(4, np.int32))
    segments = [Segment(np.zeros(n, np.int32), np.full(n, -1, np.float32), 0) for n in (3, 9)]
    members = [Sample(GroupId(5, 2, "p7").member(m), prompt, SamplingSpec(max_new_tokens=9)) for m in (0, 1)]
    samples = (members[0].extended(segments[0]).finished("eos"), members[1].extended(segments[1]).finished("length"))
    row = lengths_of(4, Group(GroupId(5, 2, "p7"), samples, (Reward(1.0), Failure("late"))))
    assert row["stops"] == ["eos", "length"] and row["step"] == 4
    (tmp_path / "lengths.jsonl").write_text(json.dumps(row) + "\n")
    recorded = read_lengths(str(tmp_path))
    assert (recorded.of(2, "p7", 0), recorded.of(2, "p7", 1), recorded.of(0, "p7", 0)) == (3, 9, None)
    assert recorded.prompts == {"p7": 4}


def test_prompts_have_recorded_contexts(tmp_path: Path) -> None:
    """Two CSVs in a folder: 3 of 4 requests have 10 tokens of prompt, the other has 500."""
    (tmp_path / "a.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,5\n1,10,6\n")
    (tmp_path / "b.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,500,7\n1,10,8\n")
    lengths = Lengths(Workload(lengths="recorded", path=str(tmp_path), num_prompts=4000), 0, 2)
    sizes = [len(prompt.token_ids) for prompt in lengths.prompts()]
    assert set(sizes) == {10, 500} and sizes.count(500) == pytest.approx(1000, rel=0.1)
    assert lengths.recorded is not None and lengths.recorded.sorted_tokens.tolist() == [5, 6, 7, 8]


def test_a_folder_without_lengths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="recorded lengths are missing"):
        read_lengths(str(tmp_path))
