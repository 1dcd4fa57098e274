"""Whole runs of what engine and trainer do together: replayed routes (R3), noise (QeRL), adaptive temperatures (HAPO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import april
from april.config.resolve import resolve
from april.core.errors import ModelError, RecipeError
from april.core.group import Batch
from april.core.metric import Metrics
from april.core.sample import Sample
from april.models.policy import Policy
from april.run.build import PACKAGED_POLICY, build
from april.run.checks import check_recipe
from april.run.loop import Run
from april.testing.toy_model import toy_model
from april.text.tokenizer import Tokenizer
from april.training.single import Trainer

SUMS = [{"question": f"{a} + {b} - 3 + 2 + 7", "answer": str(a + b + 6)} for a in range(8) for b in range(5)]
SYNC = {"type": "sync"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that was trained on."""
    seen: list[Batch] = []
    plain = Trainer.update

    def update(self: Trainer, batch: Batch) -> Metrics:
        seen.append(batch)
        return plain(self, batch)

    monkeypatch.setattr(Trainer, "update", update)
    return seen


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    plain = {
        "out": str(folder),
        "steps": 2,
        "prompt": {"template": "{question}"},
        "sampling": {"max_new_tokens": 24},
        "batch": {"groups_per_step": 2, "group_size": 4},
        "engine": {"max_running": 16},
        "algorithm": {"preset": "grpo"},
        "evaluation": {"num_problems": 4, "modes": ["greedy"]},
        "task": {"type": "items", "items": SUMS},
    }
    return plain | sections


def oddness(text: str, sample: Sample, item: Mapping[str, Any]) -> float:
    return float(sample.token_ids.sum() % 2)


def samples_of(batch: Batch) -> list[Sample]:
    return [sample for group in batch.groups for sample in group.samples]


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random mixture of experts that speaks the packaged policy's tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("experts"), Tokenizer.load(str(PACKAGED_POLICY))
    module = toy_model("qwen3_moe", vocab_size=len(tokenizer.backend), seed=1, max_positions=256)
    Policy(module).save(folder, tokenizer.backend)
    return folder


def test_a_mixture_of_experts_trains_on_the_engines_routes(experts: Path, tmp_path: Path, batches: list[Batch]) -> None:
    """With an engine of other numerics, as on a cluster: the log-probs that trainer and engine give the same tokens."""

    def mismatch(replayed: bool) -> float:
        rows: list[dict[str, Any]] = []
        engine = {"type": "embedded", "dtype": "bfloat16", "max_running": 16, "record_routes": replayed}
        tree = recipe(
            tmp_path / str(replayed),
            steps=1,
            model={"path": str(experts)},
            schedule=SYNC,
            engine=engine,
            training={"replay_routes": replayed, "lr": 1e-5},
            batch={"groups_per_step": 4, "group_size": 4},
            sampling={"max_new_tokens": 64},
        )
        april.train(tree, reward=oddness, on_step=rows.append, quiet=None)
        assert [row["optimizer_steps"] for row in rows] == [1] and rows[0]["grad_norm"] > 0
        return float(rows[0]["mismatch_kl"])

    replayed = mismatch(True)
    assert replayed < 0.003 and 10 * replayed < mismatch(False)
    recorded, not_recorded = ([sample.routes for sample in samples_of(batch)] for batch in batches)
    assert all(routes is not None and routes.shape[1:] == (2, 2) for routes in recorded)
    assert all(routes is None for routes in not_recorded)


def test_routes_survive_a_run_that_is_continued(experts: Path, tmp_path: Path, batches: list[Batch]) -> None:
    sections = {
        "model": {"path": str(experts)},
        "engine": {"type": "embedded", "record_routes": True, "max_running": 6, "steps_per_poll": 4},
        "schedule": {"type": "april", "over_provision": 2.0, "max_lag_steps": 2},
        "training": {"replay_routes": True},
        "steps": 4,
    }
    resolved = resolve(recipe(tmp_path / "run", **sections))
    first = Run(resolved, quiet=None, reward=oddness)
    first.on_step = lambda row: setattr(first.stop, "asked", True)
    assert first.run().interrupted and len(batches) < 4
    result = Run(resolved, resume=True, quiet=None, reward=oddness).run()
    assert not result.interrupted and len(batches) == 4 and result.summary["ledger_balanced"] is True
    resumed = [sample for batch in batches for sample in samples_of(batch) if sample.num_segments > 1]
    assert resumed and all(sample.routes is not None and len(sample.routes) == len(sample) for sample in resumed)
    assert all(int(sample.routes.max()) < 8 for sample in resumed if sample.routes is not None), "every token's experts are known"


def test_routes_are_recorded_and_replayed_or_neither(experts: Path, tmp_path: Path) -> None:
    for engine, training in (({"record_routes": True}, {}), ({}, {"replay_routes": True})):
        tree = recipe(tmp_path / "run", engine=engine, training=training)
        with pytest.raises(RecipeError, match="routes are") as caught:
            check_recipe(resolve(tree).recipe)
        assert caught.value.where == "engine.record_routes, training.replay_routes"
    both = {"engine": {"record_routes": True}, "training": {"replay_routes": True}}
    assert check_recipe(resolve(recipe(tmp_path / "run", **both)).recipe)
    with pytest.raises(ModelError, match="without experts"):
        build(resolve(recipe(tmp_path / "run", **both)), reward=oddness)


def test_noise_follows_the_training_steps_and_stays_with_the_sampler(tmp_path: Path, batches: list[Batch]) -> None:
    noise = {"start": 0.1, "end": 0.01, "stages": 3}
    rows: list[dict[str, Any]] = []
    tree = recipe(tmp_path / "run", steps=3, seed=5, schedule=SYNC, engine={"type": "embedded", "noise": noise})
    april.train(tree, reward=oddness, on_step=rows.append, quiet=None)
    samplers = [{span.sampler for sample in samples_of(batch) for span in sample.spans} for batch in batches]
    assert samplers == [{"embedded-float32"}, {"embedded-float32+noise-0.1"}, {"embedded-float32+noise-0.01"}]
    assert rows[0]["mismatch_abs_mean"] < 1e-4 < 0.01 < rows[1]["mismatch_abs_mean"]
    assert rows[2]["mismatch_abs_mean"] < rows[1]["mismatch_abs_mean"]


def test_noise_without_a_correction_is_refused(tmp_path: Path) -> None:
    engine = {"type": "embedded", "noise": {}}
    bare = {"preset": "grpo", "weights": {"tis": False}}
    with pytest.raises(RecipeError, match="without a correction") as caught:
        check_recipe(resolve(recipe(tmp_path, schedule=SYNC, engine=engine, algorithm=bare)).recipe)
    assert "engine.noise" in str(caught.value.where)
    assert check_recipe(resolve(recipe(tmp_path, schedule=SYNC, algorithm=bare)).recipe)
    assert check_recipe(resolve(recipe(tmp_path, schedule=SYNC, engine=engine)).recipe)


def test_hapo_is_all_there_with_its_preset_alone(tmp_path: Path, batches: list[Batch]) -> None:
    resolved = resolve(recipe(tmp_path / "run", schedule=SYNC, algorithm={"preset": "hapo"}, checkpoint={"every_steps": 1}))
    assert resolved.origin("sampling.adaptive_temperature") == "preset hapo"
    assert resolved.recipe.sampling.entropy and resolved.recipe.sampling.max_new_tokens == 24
    rows: list[dict[str, Any]] = []
    first = Run(resolved, quiet=None, reward=oddness, on_step=rows.append)
    first.run()
    rules = [{sample.spec.adaptive for sample in samples_of(batch)} for batch in batches]
    assert rules[0] == {None} and len(rules[1]) == 1
    (rule,) = rules[1]
    assert rule is not None and rule.strength == 0.05 and first.parts.driver.spec.adaptive not in (None, rule)
    assert rows[1]["mismatch_abs_mean"] < 1e-4, "the learner takes each token's own temperature"
    temperatures = np.concatenate([rule.factors(sample.entropies) for sample in samples_of(batches[1])])
    assert 0.95 <= temperatures.min() < 0.97 and 1 < temperatures.max() <= 1.05
    longer = resolve({**recipe(tmp_path / "run", schedule=SYNC, algorithm={"preset": "hapo"}), "steps": 3})
    again = Run(replace(longer), resume=True, quiet=None, reward=oddness)
    assert again.parts.driver.spec.adaptive == first.parts.driver.spec.adaptive
    again.parts.close()


def test_adaptive_temperatures_need_entropies(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sampling\.entropy"):
        resolve(recipe(tmp_path, sampling={"adaptive_temperature": 0.05}))
    off = recipe(tmp_path, algorithm={"preset": "hapo"}, sampling={"adaptive_temperature": 0.0})
    assert resolve(off).recipe.sampling.adaptive_temperature == 0.0


def test_metrics_say_what_drafts_do_and_what_kv_was_there(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    drafts = {"max_running": 16, "max_draft_tokens": 3, "draft_match_tokens": 1, "draft_adaptive": False}
    given = recipe(tmp_path / "run", engine=drafts, schedule=SYNC, evaluation={"num_problems": 2, "modes": ["greedy"]})
    april.train(given, reward=oddness, on_step=rows.append, quiet=None)
    assert all(0 < row["accepted_tokens"] < row["drafted_tokens"] and row["speculation"] == "on" for row in rows)
    assert all(row["shared_tokens"] > 0 == row["forked_tokens"] == row["resumed_tokens"] for row in rows)
    april.train(recipe(tmp_path / "plain", schedule=SYNC), reward=oddness, on_step=rows.append, quiet=None)
    assert (rows[-1]["drafted_tokens"], rows[-1]["accepted_tokens"], rows[-1]["speculation"]) == (0, 0, "off")
