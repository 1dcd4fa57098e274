"""The value model: what it sees, what it learns, that it and the policy leave each other alone, and its state."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from learner_fixtures import make_batch, make_group, small_policy, snapshot
from numpy.random import default_rng

from april.algorithms.losses.compose import Algorithm, credit
from april.algorithms.spec import AlgorithmConfig
from april.core.errors import CheckpointError, ModelError, RecipeError
from april.core.group import Batch
from april.core.metric import values
from april.models.policy import PackedSequences
from april.training.batch import assemble
from april.training.config import TrainerConfig, ValueConfig
from april.training.single import Trainer
from april.training.value import ValueModel

PPO = {
    "advantage": {"type": "gae", "lam": 0.95},
    "aggregate": "token_mean",
    "objectives": {"value": {"clip": None}},
}
REWARDS = [[1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.25], [1.0, 1.0], [0.0, 0.75, None]]


def trainer(*, algorithm: dict[str, Any] | None = None, value: dict[str, Any] | None = None, **options: Any) -> Trainer:
    settings = ValueConfig(**({"lr": 1e-2} | (value or {})))
    config = TrainerConfig(**({"lr": 1e-2, "value": settings} | options))
    policy = options.pop("policy", None) or small_policy()
    return Trainer(policy, AlgorithmConfig.model_validate(PPO if algorithm is None else algorithm), config)


def model(seed: int = 0) -> ValueModel:
    value = ValueModel(small_policy(seed=seed), Algorithm.of(AlgorithmConfig.model_validate(PPO)), TrainerConfig())
    torch.manual_seed(0)
    torch.nn.init.normal_(value.trunk.module.value_head.weight)
    return value


def test_the_value_is_that_of_the_state_before_the_token() -> None:
    subject, data = model(), assemble(make_batch(REWARDS))
    got = subject.values(data)
    at = 0
    for sample in data.samples:
        ids = torch.tensor([*sample.prompt.token_ids.tolist(), *sample.token_ids.tolist()])[None]
        hidden = subject.trunk.module.model(input_ids=ids).last_hidden_state[0]  # type: ignore[operator, union-attr]
        expected = subject.trunk.module.value_head(hidden[len(sample.prompt.token_ids) - 1 : -1])[:, 0]
        assert torch.allclose(got[at : at + len(sample)], expected, atol=1e-9)
        at += len(sample)
    assert float(got.abs().max()) > 0.1 and at == len(got)


def test_without_training_it_says_zero_and_credit_is_the_return() -> None:
    policy, data = small_policy(), assemble(make_batch(REWARDS))
    atoms = Algorithm.of(AlgorithmConfig.model_validate({**PPO, "advantage": {"type": "gae", "lam": 1.0}}))
    zeros = ValueModel(policy, atoms, TrainerConfig()).values(data)
    tokens = credit(atoms, data.tokens.with_columns(value=zeros))
    assert zeros.eq(0).all() and torch.allclose(tokens["advantage"], tokens["reward"])
    assert torch.equal(tokens["return"], tokens["advantage"])


def test_it_learns_the_returns_and_the_policy_does_not_feel_it() -> None:
    subject = trainer(lr=1e-12)
    before = snapshot(subject.policy)
    batch = make_batch([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    rows = [values(subject.update(Batch(i, i, batch.groups))) for i in range(12)]
    assert rows[-1]["value_loss"] < 0.5 * rows[0]["value_loss"]
    assert rows[0]["value_mean"] == 0 and rows[0]["return_mean"] > 0.3 and rows[0]["value_optimizer_steps"] == 1
    assert rows[-1]["value_explained_variance"] > rows[1]["value_explained_variance"]
    after = snapshot(subject.policy)
    assert all(float((before[name] - after[name]).abs().max()) < 1e-9 for name in before)
    assert any(float((subject._value.trunk.weights()[name] - before[name]).abs().max()) > 1e-3 for name in before)  # type: ignore[union-attr]


def test_during_its_warm_up_the_policy_stands_still_and_targets_are_monte_carlo() -> None:
    subject = trainer(value={"warmup_steps": 2})
    before, batch = snapshot(subject.policy), make_batch(REWARDS)
    rows = []
    for i in range(3):
        rows.append(values(subject.update(Batch(i, i, batch.groups))))
        moved = any(not torch.equal(before[name], tensor) for name, tensor in snapshot(subject.policy).items())
        assert moved is (i == 2) and subject.version == i + 1
    assert [row["value_warmup"] for row in rows] == [1, 1, 0] and [row["optimizer_steps"] for row in rows] == [0, 0, 1]
    tokens = assemble(batch).tokens
    assert rows[1]["return_mean"] == pytest.approx(float(tokens["reward"].mean()))  # although values are no longer 0
    assert rows[2]["return_mean"] != pytest.approx(float(tokens["reward"].mean()), rel=1e-6)
    assert rows[2]["lag_optimizer_steps_max"] == 0


def test_mini_batches_and_epochs_of_its_own() -> None:
    subject = trainer(num_optimizer_steps=2, value={"num_epochs": 3})
    row = values(subject.update(make_batch(REWARDS)))
    assert row["value_optimizer_steps"] == 6 and row["optimizer_steps"] == 2


@pytest.mark.parametrize("budget", [1, 17])
def test_any_split_gives_the_same_value_model(budget: int) -> None:
    ends = []
    for tokens in (10_000, budget):
        subject = trainer(micro_batch_tokens=tokens)
        subject.update(make_batch(REWARDS))
        ends.append(subject._value.state_dict())  # type: ignore[union-attr]
    whole, split = ends
    assert all(torch.allclose(whole["weights"][name], split["weights"][name], atol=1e-7) for name in whole["weights"])
    head = [end["weights"]["value_head.weight"] for end in ends]
    assert torch.allclose(*head, atol=1e-8) and float(head[0].abs().max()) > 1e-3


def test_finished_only_leaves_cut_responses_alone() -> None:
    group = make_group(0, [1.0, 0.0], default_rng(0), lengths=[3, 3])
    for sample in group.samples:
        object.__setattr__(sample, "stop", "length")
    options = {**PPO, "objectives": {"value": {"finished_only": True}}}
    quiet, loud = trainer(algorithm=options), trainer()
    rows = [values(subject.update(Batch(0, 0, (group,)))) for subject in (quiet, loud)]
    assert rows[0]["value_loss"] == 0 and rows[1]["value_loss"] > 0


def test_state_round_trip_continues_bit_for_bit() -> None:
    one = trainer(value={"warmup_steps": 1})
    one.update(make_batch(REWARDS))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two, fresh = trainer(value={"warmup_steps": 1}), trainer(value={"warmup_steps": 1})
    two.load_state_dict(torch.load(file, weights_only=True))
    rows = [values(subject.update(make_batch(REWARDS, seed=1, version=1))) for subject in (one, two, fresh)]
    assert rows[0]["value_loss"] == rows[1]["value_loss"] != rows[2]["value_loss"]
    assert rows[0]["optimizer_steps"] == 1 and rows[2]["optimizer_steps"] == 0
    a, b = one._value.state_dict(), two._value.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


def test_a_state_without_value_model_is_refused() -> None:
    state = copy.deepcopy(trainer(algorithm={}).state_dict())
    with pytest.raises(CheckpointError, match="does not fit") as error:
        trainer().load_state_dict(state)
    assert "value" in str(error.value)


def test_values_that_nothing_trains_are_refused() -> None:
    with pytest.raises(RecipeError, match="nothing trains a value model") as error:
        trainer(algorithm={"advantage": "gae"})
    assert "algorithm.objectives.value" in str(error.value)


def test_a_value_model_that_breaks_is_named_or_skipped() -> None:
    broken = trainer()
    with torch.no_grad():
        broken._value.trunk.module.value_head.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="not finite"):
        broken.update(make_batch(REWARDS))
    skipping = trainer(algorithm={**PPO, "advantage": "group"}, nonfinite="skip")
    with torch.no_grad():
        skipping._value.trunk.module.value_head.bias.fill_(float("nan"))  # type: ignore[union-attr]
    assert values(skipping.update(make_batch(REWARDS)))["nonfinite_steps"] == 1


def test_hidden_states_of_models_without_a_lean_forward() -> None:
    policy = small_policy("gpt_neox")
    sample = make_batch(REWARDS).groups[0].samples[0]
    sequences = PackedSequences.of([sample.prompt.token_ids], [sample.token_ids])
    hidden = policy.response_hidden(sequences)
    assert hidden.shape == (len(sample), 16) and hidden.requires_grad
    twin = policy.copy()
    assert twin.module is not policy.module and torch.equal(twin.response_hidden(sequences), hidden)
