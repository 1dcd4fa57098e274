"""The presets of the learner do what they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learner_fixtures import make_batch, make_group, small_policy, snapshot
from numpy.random import default_rng

from april.algorithms.losses.compose import Algorithm, credit
from april.algorithms.spec import AlgorithmConfig
from april.config.load import read_preset
from april.core.group import Batch
from april.core.metric import values
from april.training.batch import assemble
from april.training.config import TrainerConfig, ValueConfig
from april.training.single import Trainer

REWARDS = [[1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.25], [1.0, 1.0], [0.0, 0.75, None]]


def preset(name: str) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(read_preset(name)[0])


def trainer(name: str, **options: Any) -> Trainer:
    return Trainer(small_policy(), preset(name), TrainerConfig(**({"lr": 1e-2} | options)))


def cut_group() -> Batch:
    group = make_group(0, [0.0, 1.0], default_rng(0), lengths=[4, 4])
    object.__setattr__(group.samples[0], "stop", "length")
    return Batch(0, 0, (group,))


def test_ppo_gives_the_tokens_of_one_response_different_credit_and_learns_values() -> None:
    subject = trainer("ppo", value=ValueConfig(lr=1e-2, num_epochs=4))
    batch = make_batch(REWARDS)
    rows = [values(subject.update(Batch(i, i, batch.groups))) for i in range(4)]
    assert rows[-1]["value_loss"] < rows[0]["value_loss"] and rows[-1]["value_explained_variance"] > 0
    value = subject._value.values(assemble(batch))  # type: ignore[union-attr]
    tokens = credit(Algorithm.of(preset("ppo")), assemble(batch).tokens.with_columns(value=value))
    layout, advantage = tokens.layout, tokens["advantage"]
    spread = layout.sum((advantage - layout.spread(layout.mean(advantage, tokens["mask"]))).square())
    assert float(spread.max()) > 1e-3
    group = credit(Algorithm.of(preset("grpo")), assemble(batch).tokens)["advantage"]
    assert float((group - layout.spread(layout.first(group))).abs().max()) == 0.0


def test_t_ppo_holds_the_value_where_a_response_was_cut() -> None:
    tokens = assemble(cut_group()).tokens
    value = torch.tensor([0.2, 0.35, 0.5, 0.55] * 2, dtype=torch.float64)
    raw = {}
    for name in ("ppo", "t_ppo"):
        atoms = Algorithm.of(preset(name).model_copy(update={"adjust": ()}))
        raw[name] = credit(atoms, tokens.with_columns(value=value))
    assert raw["t_ppo"]["advantage"].tolist() == pytest.approx([0.337625, 0.1975, 0.05, 0, 0.72344375, 0.603625, 0.4775, 0.45])
    assert raw["ppo"]["advantage"][3] == pytest.approx(-0.55)  # PPO takes the cut for the end, with reward 0
    assert raw["t_ppo"]["return"][4:].tolist() == pytest.approx([1.0] * 4)  # Monte Carlo
    assert raw["ppo"]["return"][4] < 1.0
    row = values(trainer("t_ppo").update(cut_group()))
    alone = values(trainer("t_ppo").update(make_batch([[1.0, 0.0]])))
    assert row["value_loss"] == pytest.approx(0.25) and alone["value_loss"] != pytest.approx(0.25)  # 4 of 8 tokens, (0 - 1)^2 / 2


def test_sfpo_takes_four_steps_and_ends_short_of_where_they_lead() -> None:
    batch = make_batch(REWARDS)
    ends, start = {}, snapshot(small_policy())
    for name, epochs in (("sfpo", 1), ("grpo", 1), ("grpo", 4)):
        subject = trainer(name, num_epochs=epochs, lr=1e-3)
        row = values(subject.update(batch))
        ends[name, epochs] = sum(float((snapshot(subject.policy)[key] - start[key]).square().sum()) for key in start) ** 0.5
        assert row["optimizer_steps"] == {("sfpo", 1): 4, ("grpo", 1): 1, ("grpo", 4): 4}[name, epochs]
    assert ends["grpo", 1] < ends["sfpo", 1] < ends["grpo", 4]


def test_adept_tries_every_number_of_passes_and_keeps_count() -> None:
    subject = trainer("adept", lr=1e-4)
    rows = [values(subject.update(make_batch(REWARDS, seed=i, version=i, step=i))) for i in range(7)]
    assert [row["update_epochs"] for row in rows[:6]] == [1, 2, 3, 1, 2, 3]
    assert [row["optimizer_steps"] for row in rows] == [row["update_epochs"] for row in rows]
    assert sum(subject.state_dict()["update"]["trials"]) == 7 and min(subject.state_dict()["update"]["trials"]) == 2


def test_a_pair_objective_trains_without_a_policy_loss() -> None:
    algorithm = {"surrogate": "none", "bounds": False, "objectives": {"simpo": {}}}
    subject = Trainer(small_policy(), AlgorithmConfig.model_validate(algorithm), TrainerConfig(lr=1e-2, micro_batch_tokens=1))
    batch = make_batch([[1.0, 0.0], [0.0, 1.0, 0.0]])
    rows = [values(subject.update(Batch(i, i, batch.groups))) for i in range(6)]
    assert all(row["policy_loss"] == 0 for row in rows)
    assert rows[-1]["simpo_loss"] < rows[0]["simpo_loss"] and rows[0]["grad_norm"] > 0
    assert rows[0]["loss"] == rows[0]["simpo_loss"]
