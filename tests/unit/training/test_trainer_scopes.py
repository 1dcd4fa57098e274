"""The trainer: what an atom must see at once, columns that a forward fills, several optimiser steps and their lag."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from learner_fixtures import make_batch, small_policy, snapshot
from torch import Tensor

from april.algorithms.atoms import SLOTS, atom
from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import Algorithm
from april.algorithms.spec import AlgorithmConfig
from april.core.group import Batch
from april.core.metric import values
from april.models.policy import Policy
from april.training.batch import assemble
from april.training.config import TrainerConfig
from april.training.single import Trainer
from april.training.step import Learner

REWARDS = [[1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.25], [1.0, 1.0], [0.0, 0.75, None], [0.5, 0.25]]


def trainer(algorithm: dict[str, Any] | None = None, policy: Policy | None = None, **options: Any) -> Trainer:
    config = TrainerConfig(**({"lr": 1e-2} | options))
    return Trainer(policy or small_policy(), AlgorithmConfig.model_validate(algorithm or {}), config, total_steps=4)


def stale(version: int = 3) -> Batch:
    return Batch(version, version, make_batch(REWARDS).groups)


@pytest.fixture
def recorded() -> Iterator[list[TokenBatch]]:
    """Atoms of wider scope that keep what they saw."""
    seen: list[TokenBatch] = []

    def normalised(tokens: TokenBatch) -> Tensor:
        seen.append(tokens)
        weight = (tokens["proximal"] - tokens["behaviour"]).exp()
        return weight / weight[tokens["mask"]].mean()

    def contrast(current: Tensor, tokens: TokenBatch) -> Tensor:
        layout = tokens.layout
        mine = layout.mean(current, tokens["trained"])
        count = layout.group_sum(torch.ones_like(mine)).clamp(min=1)
        return layout.spread((mine - (layout.group_sum(mine) / count)[layout.group_of_sample]).square())

    def bonus(current: Tensor, tokens: TokenBatch) -> Tensor:
        return -tokens["current_entropy"]

    def widened(advantage: Tensor, tokens: TokenBatch) -> Tensor:
        seen.append(tokens)
        return advantage * (1 + tokens["current_entropy"])

    needs = frozenset({"proximal", "behaviour"})
    made: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = [
        ("weights", "s_normalised", normalised, {"requires": needs, "scope": "batch"}),
        ("penalties", "s_contrast", contrast, {"scope": "group"}),
        ("penalties", "s_bonus", bonus, {"requires": frozenset({"current_entropy"})}),
        ("adjust", "s_widened", widened, {"requires": frozenset({"current_entropy"})}),
    ]
    for slot, name, function, options in made:
        atom(slot, name, **options)(function)
    yield seen
    for slot, name, _, _ in made:
        SLOTS[slot].pop(name, None)


def gradients(algorithm: dict[str, Any], dtype: torch.dtype, budget: int, batch: Batch) -> list[Tensor]:
    subject = trainer(algorithm, small_policy(dtype=dtype), max_grad_norm=1e9, micro_batch_tokens=budget)
    found: list[Tensor] = []
    parameters = list(subject.policy.module.parameters())
    subject._optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in parameters if p.grad is not None))
    subject.update(batch)
    return found


DIVERSE: list[dict[str, Any]] = [
    {"weights": {"s_normalised": {}}, "aggregate": "token_mean"},
    {"penalties": {"s_contrast": {}}},
    {"penalties": {"s_bonus": {}}, "ratio": "sequence"},
    {"adjust": [{"type": "s_widened"}, {"type": "whiten"}], "weights": {"tis": {"cap": 1.5}}},
]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("algorithm", DIVERSE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_any_split_gives_the_same_gradient(algorithm: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    whole = gradients(algorithm, dtype, 10_000, stale())
    size = max(float(g.abs().max()) for g in whole)
    assert size > 1e-3
    for budget in (1, 23, 41):
        split = gradients(algorithm, dtype, budget, stale())
        assert all(float((a - b).abs().max()) <= tolerance * max(1.0, size) for a, b in zip(whole, split, strict=True))


def test_a_weight_of_the_batch_sees_all_of_an_optimiser_step_once(recorded: list[TokenBatch]) -> None:
    subject = trainer({"weights": {"s_normalised": {}}}, num_optimizer_steps=2, micro_batch_tokens=1)
    metrics = values(subject.update(stale()))
    assert metrics["optimizer_steps"] == 2
    assert [tokens.layout.num_samples for tokens in recorded] == [9, 4]  # constant groups, too: they belong to the statistics
    policy, data = small_policy(), assemble(stale())
    before = Learner(policy, Algorithm.of(AlgorithmConfig()), TrainerConfig()).logprobs(policy, data, torch.arange(13))
    seen = torch.cat([tokens["proximal"] for tokens in recorded])
    assert torch.allclose(seen, before, atol=1e-12) and float((seen - data.tokens["behaviour"]).abs().max()) > 0.1


def test_one_step_keeps_ratio_one_beside_a_staged_weight(recorded: list[TokenBatch]) -> None:
    metrics = values(trainer({"weights": {"s_normalised": {}}}, small_policy(dtype=torch.float32)).update(stale()))
    assert metrics["ratio_mean"] == 1.0 and metrics["kl_proximal"] == 0.0
    assert metrics["weight_mean"] == pytest.approx(1.0, abs=0.2) and len(recorded) == 1


def test_groups_stay_whole_and_nothing_else_changes() -> None:
    learner = Learner(small_policy(), Algorithm.of(AlgorithmConfig()), TrainerConfig(micro_batch_tokens=20))
    batch = assemble(make_batch(REWARDS))
    parts = learner._micro_batches(batch, torch.arange(13), whole=True)
    groups = [set(batch.tokens.layout.group_of_sample[part].tolist()) for part in parts]
    assert sorted(i for part in parts for i in part.tolist()) == list(range(13)) and len(parts) > 2
    assert sum(map(len, groups)) == 5  # no group is in two of them
    alone = learner._micro_batches(batch, torch.arange(13))
    assert sum(len(set(batch.tokens.layout.group_of_sample[part].tolist())) for part in alone) > 5


def test_entropy_of_the_current_policy_before_and_within_the_loss(recorded: list[TokenBatch]) -> None:
    subject = trainer({"adjust": [{"type": "s_widened"}], "penalties": {"s_bonus": {"type": "s_bonus"}}})
    metrics = values(subject.update(make_batch(REWARDS)))
    entropy = recorded[0]["current_entropy"]
    assert entropy.shape == recorded[0]["mask"].shape and 0 < float(entropy.min()) < float(entropy.max()) < 2.9
    assert metrics["s_bonus_loss"] < 0 and "entropy" in metrics
    calm = trainer({"penalties": {"s_bonus": {}}, "surrogate": "plain", "bounds": False}, lr=3e-2)
    peaked = make_batch([[1.0, 1.0]])  # no advantage: only the entropy bonus acts
    entropies = [values(calm.update(Batch(i, i, peaked.groups)))["entropy"] for i in range(4)]
    assert entropies[-1] > entropies[0]


def test_interpolation_takes_no_forward_and_keeps_fresh_tokens() -> None:
    runs: dict[str, list[int]] = {}
    for mode in ("recompute", "interpolate"):
        subject = trainer({"weights": {"tis": {"cap": 9.0}}}, num_optimizer_steps=2, proximal=mode)
        calls: list[int] = []
        forward = subject.policy.response_logprobs

        def counted(*args: Any, calls: list[int] = calls, forward: Any = forward, **kwargs: Any) -> Any:
            calls.append(int(torch.is_grad_enabled()))
            return forward(*args, **kwargs)

        subject.policy.response_logprobs = counted  # type: ignore[method-assign]
        metrics = values(subject.update(make_batch(REWARDS)))
        runs[mode] = calls
        assert metrics["optimizer_steps"] == 2
        if mode == "interpolate":
            assert metrics["weight_mean"] == 1.0 and metrics["ratio_mean"] != 1.0  # lag 0: proximal is behaviour
    assert runs == {"recompute": [0, 1, 1], "interpolate": [1, 1]}


def test_interpolated_weights_of_stale_tokens_by_hand() -> None:
    subject = trainer({"weights": {"tis": {"cap": 1e9}}}, proximal="interpolate", skip_zero_advantage=False)
    data = assemble(stale(3))
    current = subject._learner.logprobs(subject.policy, data, torch.arange(13))
    expected = (0.75 * (current - data.tokens["behaviour"])).exp()
    metrics = values(subject.update(stale(3)))
    assert metrics["weight_mean"] == pytest.approx(float(expected.mean()), rel=1e-9)
    plain = trainer({"weights": {"tis": {"cap": 1e9}}}, skip_zero_advantage=False)
    assert values(plain.update(stale(3)))["weight_mean"] != pytest.approx(float(expected.mean()), rel=1e-3)


def test_epochs_repeat_the_mini_batches_and_count_their_age() -> None:
    subject = trainer(num_optimizer_steps=2, num_epochs=3, lr=1e-3)
    metrics = values(subject.update(make_batch(REWARDS)))
    assert metrics["optimizer_steps"] == 6 and subject.version == 1
    assert metrics["lag_optimizer_steps_max"] == 5 and 0 < metrics["lag_optimizer_steps_mean"] < 5
    assert metrics["ratio_mean"] != 1.0
    fresh = values(subject.update(make_batch(REWARDS, version=1, step=1)))
    assert fresh["lag_optimizer_steps_max"] == 11  # tokens of version 0 are trained after six steps, then five more
    once = values(trainer().update(make_batch(REWARDS)))
    assert once["lag_optimizer_steps_max"] == 0 == once["lag_optimizer_steps_mean"]


def test_skipped_mini_batches_do_not_age_tokens() -> None:
    subject = trainer(num_optimizer_steps=2)
    metrics = values(subject.update(make_batch([[1.0, 1.0], [1.0, 0.0]])))
    assert metrics["skipped_steps"] == 1 and metrics["lag_optimizer_steps_max"] == 0
    assert values(subject.update(Batch(1, 1, make_batch(REWARDS).groups)))["lag_optimizer_steps_max"] == 2


def test_only_the_named_columns_of_the_data_are_made() -> None:
    batch = make_batch(REWARDS)
    for group in batch.groups:
        for _, reward in group.rewarded:
            object.__setattr__(reward, "parts", {"format": 0.5, "length": 2.0})
    assert "part.format" not in assemble(batch, needs=frozenset({"reward"})).tokens
    one = assemble(batch, needs=frozenset({"part.format", "item.level"})).tokens
    assert one["part.format"].eq(0.5).all() and one["item.level"].isnan().all() and "part.length" not in one
    assert "part.length" in assemble(batch).tokens


@pytest.mark.parametrize(
    ("update", "steps"), [({"type": "slow_fast", "fast_steps": 2}, 6), ({"type": "bandit_epochs", "arms": [3]}, 6)]
)
def test_update_atoms_run_in_the_trainer_and_their_memory_is_saved(update: dict[str, Any], steps: int) -> None:
    one = trainer({"update": update}, num_optimizer_steps=2)
    metrics = values(one.update(make_batch(REWARDS)))
    assert metrics["optimizer_steps"] == steps and metrics["ratio_max"] > 1
    assert metrics["lag_optimizer_steps_max"] == steps - 1
    two = trainer({"update": update}, small_policy(seed=5), num_optimizer_steps=2)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.state_dict()["update"] == one.state_dict()["update"] != {}
    results = [subject.update(make_batch(REWARDS, seed=1, version=1, step=1)) for subject in (one, two)]
    assert values(results[0])["loss"] == values(results[1])["loss"]
    a, b = snapshot(one.policy), snapshot(two.policy)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_advice_is_about_groups_that_carry_no_signal() -> None:
    batch = make_batch([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    metrics = values(trainer().update(batch))
    assert metrics["num_groups"] == 5 and metrics["no_signal_groups"] == 3 and metrics["group_size"] == 2
    assert metrics["advised_group_size"] == 8 and metrics["advised_no_signal_fraction"] == pytest.approx(0.8**8 + 0.2**8)
    shaped = values(trainer().update(make_batch([[0.9, 0.2], [0.1, 0.3]])))
    assert shaped["no_signal_groups"] == 0 and "advised_group_size" not in shaped


def test_state_without_its_parts_is_refused() -> None:
    from april.core.errors import CheckpointError

    state = {key: value for key, value in trainer().state_dict().items() if key != "steps_at"}
    with pytest.raises(CheckpointError, match="does not fit") as error:
        trainer().load_state_dict(state)
    assert "steps_at" in str(error.value)
