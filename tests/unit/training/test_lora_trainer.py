"""A trainer of adapters: only they change, are clipped, saved and published; it continues bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_fixtures import make_batch, small_policy, snapshot

from april.algorithms.spec import AlgorithmConfig
from april.config.load import read_preset
from april.core.errors import CheckpointError
from april.core.group import Batch
from april.core.metric import values
from april.models.policy import Policy, WithoutAdapters
from april.training.config import TrainerConfig
from april.training.single import Trainer

REWARDS = [[1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.25], [1.0, 1.0], [0.0, 0.75, None]]


def trainer(preset: str = "grpo", lora: dict[str, Any] | None = None, base: Policy | None = None, **options: Any) -> Trainer:
    settings = {"lora": {"rank": 3, "alpha": 6.0} | (lora or {}), "lr": 1e-2} | options
    algorithm = AlgorithmConfig.model_validate(read_preset(preset)[0])
    return Trainer(base or small_policy(), algorithm, TrainerConfig.model_validate(settings), total_steps=4)


def batch(step: int) -> Batch:
    return Batch(step, step, make_batch(REWARDS, seed=step).groups)


def test_only_adapters_change_and_only_they_are_optimised_saved_and_published() -> None:
    base = small_policy()
    before, subject = snapshot(base), trainer(base=base)
    published = {name: tensor.clone() for name, tensor in subject.weights().items()}
    for step in range(3):
        subject.update(batch(step))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.weights().items())
    changed = [name for name, tensor in subject.weights().items() if not torch.equal(tensor, published[name])]
    assert len(changed) == 2 * 7 * 2 and len(published) == 3 * 7 * 2
    state, num = subject.state_dict(), 2 * 7 * 2
    assert len(state["weights"]) == len(state["optimizer"]["state"]) == num
    assert sum(len(group["params"]) for group in subject._optimizer.param_groups) == num
    assert all(".lora_" in name for name in state["weights"])


def test_the_gradient_norm_is_that_of_the_adapters() -> None:
    subject, whole = trainer(lr=1e-12), trainer(lr=1e-12)
    whole.config = TrainerConfig(lora=whole.config.lora, lr=1e-12)
    row = values(subject.update(batch(0)))
    found: list[torch.Tensor] = []
    plain = whole._learner.backward

    def backward(*arguments: Any) -> Any:
        metrics = plain(*arguments)
        found.extend(p.grad.clone() for p in whole.policy.module.parameters() if p.grad is not None)
        return metrics

    object.__setattr__(whole._learner, "backward", backward)
    whole.update(batch(0))
    assert row["grad_norm"] == pytest.approx(float(torch.stack([g.norm() for g in found]).norm()))
    assert len(found) == 2 * 7 * 2 and row["grad_norm"] > 0


def test_the_base_is_the_reference_without_a_second_copy() -> None:
    base = small_policy()
    subject = trainer("grpo_kl", base=base)
    assert isinstance(subject._learner.reference, WithoutAdapters)
    assert subject._learner.reference.module is subject.policy.module
    first = values(subject.update(batch(0)))
    assert abs(first["kl_reference"]) < 1e-9
    given = Trainer(
        small_policy(),
        AlgorithmConfig.model_validate(read_preset("grpo_kl")[0]),
        TrainerConfig.model_validate({"lora": {"rank": 3, "alpha": 6.0}, "lr": 1e-2}),
        reference=small_policy(),
        total_steps=4,
    )
    given.update(batch(0))
    rows = [values(one.update(batch(1))) for one in (subject, given)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("preset", ["grpo", "ppo"])
def test_it_continues_bit_for_bit(tmp_path: Path, preset: str, dropout: float) -> None:
    lora = {"dropout": dropout}
    one, two, fresh = (trainer(preset, lora, num_optimizer_steps=2) for _ in range(3))
    one.update(batch(0))
    one.save(tmp_path)
    torch.manual_seed(7)  # what others draw has no say
    two.load(tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() and not (tmp_path / "model").exists()
    for subject in (one, two, fresh):
        subject.update(batch(1))
    ends = [subject.state_dict() for subject in (one, two, fresh)]
    assert all(torch.equal(ends[0]["weights"][name], ends[1]["weights"][name]) for name in ends[0]["weights"])
    assert any(not torch.equal(ends[0]["weights"][name], ends[2]["weights"][name]) for name in ends[0]["weights"])
    if preset == "ppo":
        assert all(
            torch.equal(ends[0]["value"]["weights"][n], ends[1]["value"]["weights"][n]) for n in ends[0]["value"]["weights"]
        )


def test_dropout_is_of_training_forwards_only() -> None:
    plain, dropped = trainer(), trainer(lora={"dropout": 0.5})
    rows = [values(subject.update(batch(0))) for subject in (plain, dropped)]
    assert rows[0]["grad_norm"] != pytest.approx(rows[1]["grad_norm"], rel=1e-3), "B is 0, and its gradient sees what is left out"
    dropped.policy.load_state(plain.policy.state())
    data = [subject._learner for subject in (plain, dropped)]
    from april.training.batch import assemble

    prepared = assemble(batch(1))
    everything = torch.arange(prepared.tokens.layout.num_samples)
    assert torch.equal(*(one.logprobs(one.policy, prepared, everything) for one in data))


def test_a_value_model_has_adapters_on_the_same_base() -> None:
    subject = trainer("ppo")
    trunk = subject._value.trunk  # type: ignore[union-attr]
    shared = {t.data_ptr() for t in subject.policy.module.parameters() if not t.requires_grad}
    assert {t.data_ptr() for t in trunk.module.parameters() if not t.requires_grad} == shared
    before = {name: tensor.clone() for name, tensor in trunk.state().items()}
    subject.update(batch(0))
    row = values(subject.update(batch(1)))
    assert row["value_optimizer_steps"] >= 1
    assert sum(".lora_" in name for name in before) == 2 * 7 * 2 and "value_head.weight" in before
    assert any(not torch.equal(before[name], tensor) for name, tensor in trunk.state().items() if ".lora_" in name)


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_a_state_of_another_shape_is_refused(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    trainer().save(tmp_path)
    options = {"lora": lora} if lora else {}
    other = Trainer(small_policy(), AlgorithmConfig(), TrainerConfig.model_validate(options))
    with pytest.raises(CheckpointError, match="does not fit"):
        other.load(tmp_path)
    assert other.version == 0
