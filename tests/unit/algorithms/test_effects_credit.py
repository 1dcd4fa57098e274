"""What each preset of the advantages is for, by numbers, on data where it matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adv_fixtures import F64, ragged
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import Algorithm, credit
from april.algorithms.spec import AlgorithmConfig
from april.config.load import read_preset

LINE, EOS = 35, 1


def advantage_of(preset: str, tokens: TokenBatch, **options: Any) -> Tensor:
    """The credit of a preset, with some options of its advantage replaced."""
    data = read_preset(preset)[0]
    data["advantage"] |= options
    config = AlgorithmConfig.model_validate(data)
    assert not {"turn", "anchor", "value"} & config.advantage.needs - set(tokens.columns)
    return credit(Algorithm.of(config), tokens)["advantage"]


def solved(num_correct: int, num: int, lengths: list[int] | None = None, **columns: Any) -> TokenBatch:
    """One group whose first members are right."""
    reward = [1.0] * num_correct + [0.0] * (num - num_correct)
    return ragged(lengths or [1] * num, [0] * num, reward=reward, correct=reward, **columns)


def working(*lines: list[int]) -> list[int]:
    """A worked solution of the packaged policy: lines that begin with the token of a line break."""
    return [token for line in lines for token in [LINE, *line]] + [EOS]


def test_reinforce_has_no_baseline() -> None:
    assert advantage_of("reinforce", solved(2, 4)).tolist() == [1, 1, 0, 0]
    assert advantage_of("reinforce", solved(4, 4)).tolist() == [1] * 4  # all right: still pushed up


def test_reinforce_pp_scales_by_the_batch_and_not_by_the_group() -> None:
    tokens = ragged([1] * 4, [0, 0, 1, 1], reward=[1.0, 1, 1, 0])
    assert advantage_of("reinforce_pp", tokens)[0] > 0  # constant groups keep their signal
    assert advantage_of("grpo", tokens)[0] == 0
    based = advantage_of("reinforce_pp_baseline", tokens)
    assert based[:2].tolist() == [0, 0] and torch.allclose(based[2], torch.tensor(1.224745, dtype=F64))


@pytest.mark.parametrize(("preset", "column"), [("remax", "baseline"), ("pvpo", "item.baseline")])
def test_a_measured_baseline_lets_constant_groups_learn(preset: str, column: str) -> None:
    tokens = solved(4, 4).with_columns(**{column: torch.full((4,), 0.25, dtype=F64)})
    assert advantage_of(preset, tokens).tolist() == [0.75] * 4
    assert not advantage_of("grpo", tokens).any()


def test_opo_leans_on_long_answers() -> None:
    tokens = solved(1, 2, lengths=[9, 1])
    assert torch.allclose(advantage_of("opo", tokens), torch.tensor([0.1] * 9 + [-0.9], dtype=F64))
    assert advantage_of("dr_grpo", tokens)[-1] == -0.5


def test_max_rl_prefers_the_rare_success() -> None:
    rare, common = advantage_of("max_rl", solved(1, 8)), advantage_of("max_rl", solved(7, 8))
    assert rare[0] > 6.99 and common[0] < 0.143
    ratio = advantage_of("grpo", solved(1, 8))[0] / advantage_of("grpo", solved(7, 8))[0]
    assert rare[0] / common[0] > 5 * ratio


def test_pass_at_k_stops_pushing_easy_prompts() -> None:
    assert not advantage_of("pass_at_k", solved(5, 8)).any()  # every four of these have a right one
    hard = advantage_of("pass_at_k", solved(1, 8))
    assert hard[0] == pytest.approx(1.0, abs=1e-5) and hard[1] == pytest.approx(-1 / 7, abs=1e-5)
    assert advantage_of("grpo", solved(5, 8)).all()


def test_gdpo_tells_apart_what_the_sum_confuses() -> None:
    accuracy, form = torch.tensor([1.0, 0, 0, 0], dtype=F64), torch.tensor([0.0, 1, 1, 1], dtype=F64)
    tokens = ragged([1] * 4, [0] * 4, reward=accuracy + form).with_columns(**{"part.accuracy": accuracy, "part.format": form})
    assert not advantage_of("grpo", tokens).any()
    weighted = advantage_of("gdpo", tokens, parts={"accuracy": 2.0, "format": 1.0})
    assert weighted[0] > 0 > weighted[1]


def test_grape_lets_sure_items_decide() -> None:
    parts = {"correctness": [1.0, 0], "reasoning": [0.0, 1], "style": [0.0, 1]}
    sure = {"correctness": [0.9, 0.9], "reasoning": [0.1, 0.1], "style": [0.1, 0.1]}
    columns = {f"part.{name}": torch.tensor(value, dtype=F64) for name, value in parts.items()}
    columns |= {f"part.{name}_confidence": torch.tensor(value, dtype=F64) for name, value in sure.items()}
    tokens = ragged([1, 1], [0, 0], reward=[0.0, 0]).with_columns(**columns)
    assert advantage_of("grape", tokens).tolist() == pytest.approx([0.4, -0.4])
    unsure = {f"part.{name}_confidence": columns["part.style_confidence"] for name in parts}
    assert advantage_of("grape", tokens.with_columns(**unsure)).tolist() == pytest.approx([0.0, 0.0])


def test_loop_leaves_one_out_and_clips() -> None:
    assert torch.allclose(advantage_of("loop", solved(1, 4)), torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3], dtype=F64))
    clipped = AlgorithmConfig.model_validate(read_preset("loop")[0])
    assert clipped.surrogate.type == "clip" and clipped.bounds is not None


def test_two_grpo_gives_plus_and_minus_one() -> None:
    assert advantage_of("two_grpo", solved(1, 2)).tolist() == pytest.approx([1, -1])
    assert not advantage_of("two_grpo", solved(2, 2)).any()
    assert advantage_of("grpo", solved(1, 2))[0] == pytest.approx(0.707106, abs=1e-5)


def test_gigpo_blames_the_line_where_a_solution_goes_wrong() -> None:
    """3 + 4 - 2: both reach `7 - 2`, then one writes 5 and the other 4; a third guesses at once and is wrong."""
    right, wrong, guess = working([10, 27], [8]), working([10, 27], [7]), working([9])
    ids = right + wrong + guess
    tokens = ragged([len(right), len(wrong), len(guess)], [0] * 3, reward=[1.0, 0, 0], token_ids=ids)
    found = advantage_of("gigpo", tokens, delimiter_ids=(LINE,))
    episode = advantage_of("gigpo", tokens, delimiter_ids=(LINE,), omega=0.0)
    step = found - episode
    assert step[[3, len(right) + 3]].tolist() == pytest.approx([0.5, -0.5])  # the second lines start from one state
    first = 0.95 / 3
    assert step[0] == pytest.approx(2 * first) and step[len(right)] == pytest.approx(-first) and step[-1] == pytest.approx(-first)
    assert len(set(found[: len(right)].tolist())) == 2 and len(set(episode[: len(right)].tolist())) == 1


def test_ui_s1_discounts_what_lies_far_ahead() -> None:
    right, wrong = working([10, 27], [8]), working([10, 27], [7])
    long = working([10, 27], [8, 27], [6])
    tokens = ragged([len(right), len(wrong), len(long)], [0] * 3, reward=[1.0, 0, 1], token_ids=right + wrong + long)
    found = advantage_of("ui_s1", tokens, delimiter_ids=(LINE,))
    assert found[0] > found[len(right) + len(wrong)] > 0 > found[len(right)]
    assert found[3] > found[0]  # the line that ends it has all of the reward


def forks() -> TokenBatch:
    """Two beginnings; the first leads to one right and one wrong answer, the second to two wrong ones."""
    ids = [5, 6, 7, 8, 5, 6, 9, 9, 3, 3, 7, 8, 3, 3, 9, 9]
    tokens = ragged([4] * 4, [0] * 4, reward=[1.0, 0, 0, 0], token_ids=ids)
    return tokens.with_columns(behaviour=torch.full((16,), -1.0, dtype=F64))


def test_treepo_compares_below_each_shared_prefix() -> None:
    found = advantage_of("treepo", forks(), segment_tokens=2).reshape(4, 4)[:, 0]
    plain = advantage_of("treepo", forks(), segment_tokens=4).reshape(4, 4)[:, 0]
    assert found[1] < found[2] == found[3] < found[0]  # wrong where a sibling was right is worse
    assert plain[1] == plain[2] == plain[3]


def test_treepo_by_segment_credits_the_branch_point() -> None:
    found = advantage_of("treepo_segment", forks(), segment_tokens=2).reshape(4, 4)
    assert torch.equal(found[0, :2], found[1, :2]) and found[0, 0] > found[2, 0]  # the better beginning
    assert found[0, 2] > 0 > found[1, 2] and found[0, 2] > found[2, 2] > found[1, 2]


def test_tree_grpo_adds_the_comparison_within_a_tree() -> None:
    found = advantage_of("tree_grpo", forks(), segment_tokens=2).reshape(4, 4)[:, 0]
    assert found.tolist() == pytest.approx([1.5 + 0.5**0.5, -0.5 - 0.5**0.5, -0.5, -0.5], abs=1e-4)
    assert advantage_of("tree_grpo", forks(), segment_tokens=4).reshape(4, 4)[1, 0] == pytest.approx(-0.5, abs=1e-4)


def test_branch_grpo_compares_nodes_of_one_depth() -> None:
    found = advantage_of("branch_grpo", forks(), segment_tokens=2).reshape(4, 4)
    assert found[:, 0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5, -(0.5**0.5), -(0.5**0.5)])
    assert found[:, 2].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


def test_polychromic_pays_for_different_answers() -> None:
    ids = [7, 7, 7, 7, 7, 7, 7, 8]
    tokens = solved(8, 8, token_ids=ids)
    found = advantage_of("polychromic", tokens, num_sets=8)
    assert found[7] > 0 and found[7] == found.max() and not advantage_of("grpo", tokens).any()
