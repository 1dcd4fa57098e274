"""The tables and formulas of costs against figures that were worked out by hand or published."""

from __future__ import annotations

from pathlib import Path

import pytest

from april.core.errors import AprilError, DataError
from april.simulate.cost import Cluster, Costs, cluster_costs, default_mfu, engine_costs, train_costs
from april.simulate.hardware import MODELS


def test_decode_steps_of_a_7b_model_on_one_h100() -> None:
    """Spot values of the default preset: 14.6, 16.4, 22 and 30 ms at 2k context, 0.92 M tokens of KV."""
    costs = engine_costs(Cluster(model="Qwen2.5-7B"))
    steps = [1000 * costs.step_s(batch, batch * 2048) for batch in (1, 32, 128, 256)]
    assert steps == pytest.approx([14.6, 16.4, 22.2, 29.9], abs=0.05)
    assert costs.kv_tokens == pytest.approx(0.92e6, rel=0.01)
    by_hand = 0.008 + 1e-5 + (2 * 7.62e9 + 57344 * 2048) / (3.35e12 * 0.7)
    assert costs.step_s(1, 2048) == pytest.approx(by_hand, rel=1e-12)


def test_other_devices_and_tensor_parallelism() -> None:
    h200 = engine_costs(Cluster(model="Qwen2.5-7B", device="H200"))
    assert [h200.step_s(256, 256 * 2048), h200.step_s(128, 128 * 8192)] == pytest.approx([0.024, 0.0317], rel=0.01)
    assert h200.kv_tokens == pytest.approx(1.82e6, rel=0.01)
    two = engine_costs(Cluster(model="Qwen2.5-32B", tp=2))
    assert [two.step_s(32, 32 * 2048), two.step_s(128, 128 * 2048)] == pytest.approx([0.0277, 0.0400], rel=0.01)
    assert two.kv_tokens == pytest.approx(0.27e6, rel=0.01)


def test_kv_bytes_of_the_models() -> None:
    wanted = {"Qwen2.5-1.5B": 28_672, "Qwen3-1.7B": 114_688, "Qwen3-4B": 147_456, "Qwen2.5-7B": 57_344, "Qwen3-32B": 262_144}
    assert {name: MODELS[name].kv_bytes_per_token for name in wanted} == wanted


def test_a_mixture_of_experts_splits_its_weights() -> None:
    """10 in all, 4 active with 2 of 8 experts a token: 6 / (3/4) = 8 in experts, 2 beside them; 2 + 8/4 = 4."""
    moe = MODELS["Qwen3-30B-A3B"].model_copy(
        update={"parameters": 10.0, "active_parameters": 4.0, "experts": 8, "experts_per_token": 2}
    )
    assert moe.expert_parameters == pytest.approx(8.0)


def test_an_update_and_the_switch() -> None:
    cluster = Cluster(model="Qwen2.5-7B", num_devices=8, passes=8, extra_forwards=1, train_fixed_s=5)
    costs = train_costs(cluster)
    assert costs.update_s(1_000_000) == pytest.approx(5 + 1e6 * 10 * 7.62e9 / (8 * 989e12 * 0.35))
    assert costs.switch_s == pytest.approx(3 + 4 * 7.62e9 / 30e9)
    split = cluster.model_copy(update={"placement": "split", "train_devices": 2})
    assert train_costs(split).per_token_s == pytest.approx(4 * costs.per_token_s) and train_costs(split).switch_s == 0
    assert (split.rollout_devices, split.num_replicas) == (6, 6)


def test_mfu_between_its_ends() -> None:
    assert [default_mfu(p) for p in (1e9, 2e9, 7e9, 70e9)] == pytest.approx([0.18, 0.18, 0.35, 0.35])
    assert 0.18 < default_mfu(4e9) < 0.35


def test_costs_survive_the_file(tmp_path: Path) -> None:
    costs = cluster_costs(Cluster(device="MI300X", model="Qwen3-30B-A3B"))
    costs.save(tmp_path / "costs.json")
    assert Costs.load(tmp_path / "costs.json") == costs
    (tmp_path / "bad.json").write_text('{"engine": {"step_fixd_s": 1}}')
    for name in ("bad.json", "missing.json"):
        with pytest.raises(DataError, match="costs cannot be read"):
            Costs.load(tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "H1000"}, "H100"),
        ({"model": "Qwen3-8b"}, "Qwen3-8B"),
        ({"model": "Qwen3-235B-A22B"}, "no room for KV"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(AprilError, match=message):
        cluster_costs(Cluster(**fields))  # type: ignore[arg-type]


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="has an effect only"):
        Cluster(train_devices=2)
    with pytest.raises(ValueError, match="no replica"):
        Cluster(placement="split", num_devices=4, train_devices=3, tp=2)
