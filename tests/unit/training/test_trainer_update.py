"""The trainer: splits, determinism, state, degenerate batches, faults."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import make_batch, make_group, small_policy, snapshot

from april.algorithms.atoms import SLOTS, atom
from april.algorithms.spec import AlgorithmConfig
from april.core.clock import VirtualClock
from april.core.errors import CheckpointError, ModelError, RecipeError
from april.core.event import Updated
from april.core.group import Batch
from april.core.metric import values
from april.models.policy import PackedSequences, Policy
from april.training.config import TrainerConfig
from april.training.single import Trainer

REWARDS = [[1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.25], [1.0, 1.0], [0.0, 0.75, None]]


def trainer(
    policy: Policy | None = None, *, algorithm: dict[str, Any] | None = None, reference: Policy | None = None, **options: Any
) -> Trainer:
    config = TrainerConfig(**({"lr": 1e-2} | options))
    atoms = AlgorithmConfig.model_validate(algorithm or {})
    return Trainer(policy or small_policy(), atoms, config, reference=reference, total_steps=4)


def weights_after(batch: Batch, **options: Any) -> dict[str, torch.Tensor]:
    subject = trainer(**options)
    subject.update(batch)
    return snapshot(subject.policy)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return all(float((a[name] - b[name]).abs().max()) <= tolerance for name in a)


def gradients(kind: str, dtype: torch.dtype, batch: Batch, **options: Any) -> list[torch.Tensor]:
    """Gradients of one update, seen just before the optimiser step."""
    subject = trainer(small_policy(kind, dtype), max_grad_norm=1e9, **options)
    seen: list[torch.Tensor] = []
    parameters = list(subject.policy.module.parameters())
    subject._optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in parameters if p.grad is not None))
    subject.update(batch)
    return seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_any_micro_batch_split_gives_the_same_gradient(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    batch = make_batch(REWARDS)
    whole = gradients(kind, dtype, batch, micro_batch_tokens=10_000)
    assert len(whole) > 10 and max(float(g.abs().max()) for g in whole) > 1e-3
    for budget in (1, 17, 40):
        split = gradients(kind, dtype, batch, micro_batch_tokens=budget)
        assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(whole, split, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradient_equals_a_plain_padded_loop(temperature: float) -> None:
    batch = make_batch(REWARDS, temperature=temperature)
    ours = gradients("qwen3", torch.float64, batch, micro_batch_tokens=30)
    policy = small_policy()
    losses = []
    for group in batch.groups:
        rewarded = group.rewarded
        rewards = torch.tensor([reward.value for _, reward in rewarded], dtype=torch.float64)
        spread = rewards.std(correction=1)
        credit = (rewards - rewards.mean()) / (spread + 1e-6) if spread > 0 else 0 * rewards
        for (sample, _), advantage in zip(rewarded, credit, strict=True):
            ids = torch.tensor([*sample.prompt.token_ids.tolist(), *sample.token_ids.tolist()])[None]
            logits = policy.module(input_ids=ids).logits[0, len(sample.prompt.token_ids) - 1 : -1] / temperature  # type: ignore[operator]
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids.tolist())[:, None])
            losses.append(-advantage * (logprobs - logprobs.detach()).exp().mean())
    torch.stack(losses).mean().backward()
    theirs = [parameter.grad for parameter in policy.module.parameters() if parameter.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


def test_same_batch_and_state_give_the_same_bits() -> None:
    batch = make_batch(REWARDS)
    one, two = (weights_after(batch, policy=small_policy(dtype=torch.float32)) for _ in range(2))
    assert same(one, two) and not same(one, snapshot(small_policy(dtype=torch.float32)))


def test_skipping_zero_advantages_changes_no_weight() -> None:
    batch = make_batch(REWARDS)
    for steps in (1, 3):
        skipping = weights_after(batch, num_optimizer_steps=steps)
        assert same(skipping, weights_after(batch, num_optimizer_steps=steps, skip_zero_advantage=False), 1e-12)


def test_the_learner_says_on_which_share_of_the_tokens_its_numbers_are() -> None:
    rng = np.random.default_rng(0)
    groups = (make_group(0, [1.0, 0.0], rng, lengths=[3, 2]), make_group(1, [1.0, 1.0], rng, lengths=[7, 8]))
    some, everything = (values(trainer(skip_zero_advantage=skip).update(Batch(0, 0, groups))) for skip in (True, False))
    assert some["measured_fraction"] == 0.25 and everything["measured_fraction"] == 1.0
    assert some["grad_norm"] == pytest.approx(everything["grad_norm"], rel=1e-12)
    assert some["importance_ess_fraction"] != pytest.approx(everything["importance_ess_fraction"], abs=1e-3)


def own_mirror(
    log_ratio: torch.Tensor, current: torch.Tensor, advantage: torch.Tensor, bounds: object, tokens: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kimi's loss as an atom of one's own."""
    return -advantage * current + 0.05 * log_ratio.square(), torch.zeros_like(current, dtype=torch.bool)


@pytest.mark.parametrize("surrogate", ["mirror", "own_mirror"])
@pytest.mark.parametrize("rewards", [[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
def test_a_loss_that_pulls_without_advantage_trains_constant_groups(surrogate: str, rewards: list[list[float]]) -> None:
    atom("surrogate", "own_mirror", requires=frozenset({"advantage"}))(own_mirror)
    try:
        kimi = {"ratio": {"type": "token", "anchor": "behaviour"}, "bounds": False, "surrogate": surrogate}
        rows = [values(trainer(algorithm=kimi, skip_zero_advantage=skip).update(make_batch(rewards))) for skip in (True, False)]
    finally:
        del SLOTS["surrogate"]["own_mirror"]
    assert [row["optimizer_steps"] for row in rows] == [1, 1]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-12) and rows[0]["grad_norm"] > 1e-2


def test_failed_members_change_nothing() -> None:
    with_failure = make_batch([[1.0, 0.0, None]])
    group = with_failure.groups[0]
    without = Batch(0, 0, (type(group)(group.id, group.samples[:2], group.outcomes[:2]),))
    assert same(weights_after(with_failure), weights_after(without))
    other = Batch(0, 0, (type(group)(group.id, group.samples[:2], group.outcomes[1::-1]),))
    assert not same(weights_after(without), weights_after(other), 1e-6)


@pytest.mark.parametrize("rewards", [[[None, None]], [[1.0, 1.0], [0.0, 0.0]], [[0.7]]])
def test_batches_without_signal_skip_the_step_and_count_it(rewards: list[list[float | None]]) -> None:
    subject = trainer()
    before = snapshot(subject.policy)
    metrics = values(subject.update(make_batch(rewards)))
    assert metrics["skipped_steps"] == 1 and metrics["optimizer_steps"] == 0 and subject.version == 1
    assert same(before, snapshot(subject.policy))
    assert values(subject.update(make_batch(REWARDS, version=1)))["skipped_steps"] == 0
    assert not same(before, snapshot(subject.policy), 1e-6)


def stale_batch(max_token_lag: int | None) -> Batch:
    batch = make_batch(REWARDS, version=3)
    return Batch(3, 3, batch.groups, max_token_lag)


def test_a_batch_that_is_too_stale_trains_nothing_and_is_counted() -> None:
    subject = trainer(algorithm={"weights": {"tis": {}}})
    before = snapshot(subject.policy)
    metrics = values(subject.update(stale_batch(2)))
    assert metrics["too_stale_fraction"] == 1 and metrics["skipped_steps"] == 1
    assert same(before, snapshot(subject.policy))
    metrics = values(subject.update(stale_batch(3)))
    assert metrics["skipped_steps"] == 0 and metrics["too_stale_fraction"] == 0
    assert not same(before, snapshot(subject.policy), 1e-6)


def test_correction_weights_matter_for_stale_tokens() -> None:
    plain = weights_after(stale_batch(None))
    corrected = weights_after(stale_batch(None), algorithm={"weights": {"tis": {"cap": 2.0}}})
    assert not same(plain, corrected, 1e-6)
    metrics = values(trainer(algorithm={"weights": {"tis": {"cap": 1.05}}}).update(stale_batch(None)))
    assert 0 < metrics["weight_changed_fraction"] < 1 and 0 < metrics["weight_ess_fraction"] < 1
    assert metrics["weight_mean"] <= 1.05


def test_several_optimizer_steps_clip_around_the_first_weights() -> None:
    subject = trainer(num_optimizer_steps=2, lr=0.05)
    metrics = values(subject.update(make_batch(REWARDS)))
    assert metrics["optimizer_steps"] == 2 and subject.version == 1
    assert metrics["ratio_mean"] != pytest.approx(1.0, abs=1e-6) and metrics["kl_proximal"] > 0
    once = values(trainer(lr=0.05).update(make_batch(REWARDS)))
    assert once["ratio_mean"] == 1 and once["kl_proximal"] == 0 and once["clip_fraction"] == 0


def test_a_reference_penalty_needs_a_reference_and_pulls_towards_it() -> None:
    algorithm = {"penalties": {"k3": {"coefficient": 1.0}}}
    batch = make_batch([[1.0, 1.0]])  # no advantage: only the penalty acts
    with pytest.raises(RecipeError, match="reference policy"):
        trainer(algorithm=algorithm).update(batch)
    subject = trainer(algorithm=algorithm, reference=small_policy(seed=1), lr=1e-3)
    kls = [values(subject.update(Batch(i, i, batch.groups)))["kl_reference"] for i in range(6)]
    assert kls[-1] < kls[0] and kls[0] > 0.1
    itself = trainer(algorithm=algorithm, reference=small_policy())
    assert values(itself.update(batch))["grad_norm"] < 1e-12


def test_state_round_trip_continues_bit_for_bit() -> None:
    one = trainer(schedule="linear", warmup_steps=1)
    one.update(make_batch(REWARDS))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = trainer(small_policy(seed=9), schedule="linear", warmup_steps=1)
    two.load_state_dict(torch.load(file))
    fresh = trainer(small_policy(seed=0), schedule="linear", warmup_steps=1)
    for subject in (one, two, fresh):
        subject.update(make_batch(REWARDS, seed=1, version=1))
    assert two.version == one.version == 2 and same(snapshot(one.policy), snapshot(two.policy))
    assert not same(snapshot(one.policy), snapshot(fresh.policy), 1e-6)


def test_a_state_of_another_model_is_refused() -> None:
    state = trainer(small_policy("gpt_neox")).state_dict()
    with pytest.raises(CheckpointError, match="does not fit") as error:
        trainer().load_state_dict(state)
    assert "same model" in str(error.value)


def broken(parameter_value: float = float("nan")) -> Policy:
    policy = small_policy()
    with torch.no_grad():
        next(policy.module.parameters())[5] = parameter_value
    return policy


def test_a_loss_that_is_not_finite_names_step_and_samples() -> None:
    batch = make_batch(REWARDS, step=7)
    with pytest.raises(ModelError, match="not finite") as error:
        trainer(broken()).update(batch)
    assert "update 7" in str(error.value) and "g1/e0/p1/m" in str(error.value)


def test_or_it_is_skipped_and_counted() -> None:
    subject = trainer(broken(), nonfinite="skip")
    before = snapshot(subject.policy)
    metrics = values(subject.update(make_batch(REWARDS)))
    assert metrics["nonfinite_steps"] == 1 and metrics["skipped_steps"] == 1 and subject.version == 1
    after = snapshot(subject.policy)
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)


def test_the_trainer_is_a_source_of_events() -> None:
    subject = Trainer(small_policy(), AlgorithmConfig(), TrainerConfig(), clock=VirtualClock(5.0))
    assert subject.ready_at() is None and subject.poll() == [] and subject.pending() == []
    subject.submit(make_batch(REWARDS, step=4))
    assert subject.ready_at() == 5.0 and subject.pending() == ["update 4"]
    (event,) = subject.poll()
    assert isinstance(event, Updated) and event.version == 1 and event.time_s == 5.0
    assert {"loss", "grad_norm", "lr", "clip_fraction", "mismatch_kl"} <= set(event.metrics) and subject.pending() == []


def test_metrics_by_hand() -> None:
    batch = make_batch([[1.0, 0.0], [1.0, 1.0], [None, 0.5]])
    metrics = values(trainer(entropy=True).update(batch))
    assert metrics["num_failed_samples"] == 1
    assert metrics["zero_variance_fraction"] == pytest.approx(2 / 3)
    trained = sum(len(sample) for group in batch.groups for sample, _ in group.rewarded)
    assert metrics["num_tokens_trained"] == trained and metrics["lr"] == 1e-2
    behaviour = sum(float(sample.behaviour_logprobs.sum()) for group in batch.groups for sample, _ in group.rewarded)
    assert metrics["entropy_estimate"] == pytest.approx(-behaviour / trained, rel=1e-6)
    assert 0 < metrics["entropy"] < torch.tensor(17.0).log()


def test_weights_are_the_hugging_face_names_and_follow_updates() -> None:
    subject = trainer()
    names = set(subject.weights())
    assert "model.embed_tokens.weight" in names and not any(tensor.requires_grad for tensor in subject.weights().values())
    held = copy.deepcopy(subject.weights())
    subject.update(make_batch(REWARDS))
    assert not same(held, subject.weights(), 1e-6)


def test_updates_raise_the_likelihood_of_what_is_rewarded() -> None:
    group = make_group(0, [1.0, 0.0, 0.0], np.random.default_rng(0), lengths=[4, 4, 4])
    subject = trainer(lr=3e-2)

    def likelihoods() -> list[float]:
        prompts = [sample.prompt.token_ids for sample in group.samples]
        sequences = PackedSequences.of(prompts, [sample.token_ids for sample in group.samples])
        with torch.no_grad():
            return subject.policy.response_logprobs(sequences, torch.ones(12)).logprobs.view(3, 4).sum(1).tolist()  # type: ignore[no-any-return]

    before = likelihoods()
    for step in range(5):
        subject.update(Batch(step, step, (group,)))
    after = likelihoods()
    assert after[0] > before[0] + 1 and max(after[1:]) < max(before[1:])
