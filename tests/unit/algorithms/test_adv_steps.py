"""Steps, states and the credit of single steps."""

from __future__ import annotations

import math

import pytest
import torch
from adv_fixtures import F64, ragged

from april.algorithms.advantages.steps import anchored, same_step
from april.algorithms.specs.advantages_credit import Anchored, SameStep
from april.algorithms.steps import Steps, turns

LINE = 9
"""The token that begins a line in these tests."""


def environment_of(tokens_said: str) -> torch.Tensor:
    return torch.tensor([c == "e" for c in tokens_said])


def test_turns_by_hand() -> None:
    # two samples of one group; "p" is the policy, "e" the environment
    tokens = ragged([7, 6], [0, 0], token_ids=[1, 5, 6, 2, 5, 6, 3, 1, 5, 6, 2, 2, 7])
    said = environment_of("peepeep" + "peeppe")
    columns = turns(tokens["token_ids"], said, tokens.layout)
    assert columns["turn"].tolist() == [0, 1, 1, 1, 2, 2, 2, 0, 1, 1, 1, 1, 1]
    anchor = columns["anchor"].tolist()
    assert anchor[0] == anchor[7] == 0 and anchor[1] == anchor[4] == anchor[8] != 0
    other = turns(tokens["token_ids"] + (torch.arange(13) == 9), said, tokens.layout)["anchor"].tolist()
    assert other[8] != other[1] and other[1] == anchor[1]


def test_turns_without_an_environment_are_one() -> None:
    tokens = ragged([2, 3], [0, 1], token_ids=[1, 2, 3, 4, 5])
    columns = turns(tokens["token_ids"], environment_of("ppppp"), tokens.layout)
    assert not columns["turn"].any() and not columns["anchor"].any()


def test_an_environment_may_speak_first() -> None:
    tokens = ragged([2, 3], [0, 0], token_ids=[1, 2, 5, 1, 2])
    columns = turns(tokens["token_ids"], environment_of("ppepp"), tokens.layout)
    assert columns["turn"].tolist() == [0, 0, 1, 1, 1] and columns["anchor"][2] != 0


def test_lines_are_steps_and_the_line_before_is_the_state() -> None:
    ids = [LINE, 4, LINE, 7, 8, LINE, 1, LINE, 5, LINE, 7, 8, LINE, 2, 3, LINE, 4]
    steps = Steps.of(ragged([7, 7, 3], [0, 0, 0], token_ids=ids), (LINE,))
    assert steps.index.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and steps.longest == 3
    assert steps.step_of_token.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 7, 7]
    anchor = steps.anchor.tolist()
    assert anchor[0] == anchor[3] == anchor[6] == 0
    assert anchor[1] != anchor[4] and anchor[2] == anchor[5] and anchor[7] not in anchor[:7]
    assert steps.last.tolist() == [False, False, True, False, False, True, False, True]


def test_steps_from_one_state_are_compared() -> None:
    # after the same second line, one sample ends right and the other wrong
    ids = [LINE, 4, LINE, 7, LINE, 1, LINE, 5, LINE, 7, LINE, 2]
    tokens = ragged([6, 6], [0, 0], token_ids=ids, reward=[1.0, 0])
    found = anchored(tokens, gamma=0.5, delimiter_ids=(LINE,))
    # first lines start from the prompt (0.25 against 0), second from different lines, third from the same one
    assert found.tolist() == [0.625, 0.625, 0.5, 0.5, 1, 1, -0.625, -0.625, -0.5, -0.5, -1, -1]
    doubled = anchored(tokens, gamma=0.5, omega=2.0, delimiter_ids=(LINE,))
    assert doubled.tolist()[0] == 0.75 and doubled.tolist()[2] == 0.5
    assert anchored(tokens, gamma=0.5, omega=0.0, delimiter_ids=(LINE,)).tolist() == [0.5] * 6 + [-0.5] * 6


def test_states_are_of_their_group() -> None:
    tokens = ragged([1, 1], [0, 1], turn=[0, 0], anchor=[3, 3], reward=[1.0, 0])
    assert not anchored(tokens).any()
    together = ragged([1, 1], [0, 0], turn=[0, 0], anchor=[3, 3], reward=[1.0, 0])
    assert anchored(together).tolist() == [1, -1]


def test_same_step_compares_the_same_index() -> None:
    tokens = ragged([3, 2], [0, 0], turn=[0, 0, 1, 0, 1], anchor=[0] * 5, reward=[1.0, 0], token_reward=[0.0, 0, 0, 0.5, 0])
    z = 1 / math.sqrt(2)
    rows = same_step(tokens, gamma=0.5, eps=0.0, step_weight=0.0)
    # statistics over steps: 1, 1, 0.5, 0.5
    assert torch.allclose(rows, torch.tensor([1.0, 1, 1, -1, -1], dtype=F64) * 0.25 / math.sqrt(4 * 0.0625 / 3))
    once = same_step(tokens, gamma=0.5, eps=0.0, step_weight=0.0, count_episodes="once")
    assert torch.allclose(once, torch.tensor([z, z, z, -z, -z], dtype=F64))
    step = same_step(tokens, gamma=0.5, eps=0.0, episode_weight=0.0)
    assert torch.allclose(step, torch.tensor([0.0, 0, z, 0, -z], dtype=F64))  # 0.5 against 0.5, then 1 against 0


def test_returns_do_not_reach_over_a_step_that_does_not_match() -> None:
    columns = {"turn": [0, 1, 2] * 2, "anchor": [0] * 6, "reward": [1.0, 0]}
    tokens = ragged([3, 3], [0, 0], **columns).with_columns(match=torch.tensor([1, 0, 1, 1, 1, 1]).bool())
    reach = same_step(tokens, episode_weight=0.0)
    cut = same_step(tokens, episode_weight=0.0, match="match")
    assert (reach[:3] > 0).all() and cut[:2].tolist() == [0, 0] and cut[2] == reach[2]
    assert SameStep(match="match").needs == {"reward", "turn", "anchor", "match"}


def test_delimiters_take_the_place_of_columns() -> None:
    assert Anchored(delimiter_ids=(LINE,)).needs == {"reward", "token_ids"}
    assert Anchored().needs == {"reward", "turn", "anchor"}


@pytest.mark.parametrize("credit", [anchored, same_step])
def test_agreeing_groups_give_zero_and_permuted_ones_the_same(credit: object) -> None:
    assert callable(credit)
    ids = [LINE, 4, LINE, 7, LINE, 5, LINE, 8, LINE, 1, LINE, 2]
    alike = ragged([4, 4, 4], [0, 0, 1], token_ids=ids, reward=[0.7, 0.7, 0.7])
    assert not credit(alike, delimiter_ids=(LINE,)).any()
    tokens = ragged([4, 4, 4], [0, 0, 1], token_ids=ids, reward=[0.7, 0.1, 0.7])
    moved = tokens.take(torch.tensor([2, 0, 1]))
    assert torch.equal(credit(tokens, delimiter_ids=(LINE,)), credit(moved, delimiter_ids=(LINE,)).roll(-4))
    assert credit(tokens, delimiter_ids=(LINE,)).any()
    nobody = tokens.take(torch.zeros(0, dtype=torch.int64))
    assert credit(nobody, delimiter_ids=(LINE,)).shape == (0,)
