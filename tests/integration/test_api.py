"""April from Python: recipes, rewards, items and losses as objects, as in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import april
from april.algorithms.atoms import SLOTS
from april.core.errors import CheckpointError, DataError, RecipeError
from april.core.sample import Sample
from tests.integration.command_helpers import TINY

SUMS = [{"question": f"{a} + {b} - 3 + 2 + 7", "answer": str(a + b + 6)} for a in range(8) for b in range(5)]


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe as a nested dict, on problems of one's own."""
    plain = {
        "out": str(folder),
        "steps": 2,
        "prompt": {"template": "{question}"},
        "sampling": {"max_new_tokens": 24},
        "batch": {"groups_per_step": 2, "group_size": 4},
        "engine": {"max_running": 16},
        "algorithm": {"preset": "grpo"},
        "evaluation": {"num_problems": 4},
        "task": {"type": "items", "items": SUMS},
    }
    return plain | sections


def test_a_dict_a_closure_and_a_callback(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    rows: list[dict[str, Any]] = []
    wanted = 12

    def shortness(text: str, sample: Sample, item: Mapping[str, Any]) -> dict[str, float]:
        seen.append((text, item["answer"]))
        return {"short": 1 - len(text) / wanted, "right": float(text.endswith(item["answer"]))}

    result = april.train(recipe(tmp_path / "run"), reward=shortness, on_step=rows.append, quiet=None)
    assert result.folder == tmp_path / "run" and not result.interrupted
    assert [row["step"] for row in rows] == [0, 1] and all("reward_mean" in row for row in rows)
    assert result.summary["samples_trained"] == 16 and result.summary["ledger_balanced"] is True
    assert len(seen) >= 16 and {answer for _, answer in seen} <= {item["answer"] for item in SUMS}


def test_items_take_the_place_of_a_recipes_task(tmp_path: Path) -> None:
    overrides = [*TINY, "task.size=60", "prompt.template={question}", f"out='{tmp_path / 'run'}'"]
    prompts: set[str] = set()

    def reward(text: str, sample: Sample, item: Mapping[str, Any]) -> float:
        prompts.add(sample.prompt.text)
        return float(item["answer"] in text)

    result = april.train("quickstart", overrides=overrides, items=SUMS, reward=reward, quiet=None)
    assert result.summary["steps"] == 2 and prompts <= {item["question"] for item in SUMS}
    with pytest.raises(DataError, match="has no 'answer'"):
        april.train("quickstart", overrides=overrides, items=[{"question": "1 + 1"}], restart=True)


def test_a_lambda_that_calls_nothing_correct_still_trains(tmp_path: Path) -> None:
    result = april.train(recipe(tmp_path / "run"), reward=lambda text, sample, item: -0.01 * len(text), quiet=None)
    assert result.summary["accuracy_after"] == 0 and result.summary["samples_trained"] == 16


def test_a_reward_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "import april\n\ndef graded(text, sample, item, bonus=0.0):\n"
        "    right = item['answer'] in text\n    return april.Reward(bonus + right, right, {'right': float(right)})\n"
    )
    own = {"type": "python", "path": f"{tmp_path / 'rewards.py'}:graded", "options": {"bonus": 0.5}}
    rows: list[dict[str, Any]] = []
    result = april.train(recipe(tmp_path / "run", reward=own), on_step=rows.append, quiet=None)
    assert result.summary["steps"] == 2 and all(row["reward_mean"] == pytest.approx(row["accuracy"] + 0.5) for row in rows)


def test_the_same_run_again_needs_leave(tmp_path: Path) -> None:
    own = recipe(tmp_path / "run")

    def train(**how: bool) -> int:
        return int(april.train(own, reward=lambda text, sample, item: 1.0, quiet=None, **how).summary["steps"])

    assert train() == 2
    with pytest.raises(CheckpointError, match="holds a run already"):
        train()
    assert train(restart=True) == 2 and train(resume=True) == 2


@pytest.fixture
def soft_clip() -> Any:
    """A loss of one's own, forgotten afterwards; `calls` counts how often it was used."""
    calls: list[float] = []

    @april.atom("surrogate", "test_soft_clip", requires=frozenset({"advantage"}))
    def soft(log_ratio: Any, current: Any, advantage: Any, bounds: Any, tokens: Any, *, width: float = 0.2) -> Any:
        """A tanh in place of the clip."""
        calls.append(width)
        loss = -advantage * (1 + width * torch.tanh((torch.exp(log_ratio) - 1) / width))
        return loss, torch.zeros_like(loss, dtype=torch.bool)

    yield calls
    del SLOTS["surrogate"]["test_soft_clip"]


def test_a_loss_of_ones_own_by_name(tmp_path: Path, soft_clip: list[float]) -> None:
    algorithm = {"preset": "grpo", "surrogate": {"type": "test_soft_clip", "width": 0.3}}
    own = recipe(tmp_path / "run", algorithm=algorithm)
    result = april.train(own, reward=lambda text, sample, item: float(sample.id.member), quiet=None)
    assert result.summary["steps"] == 2 and len(soft_clip) >= 2 and set(soft_clip) == {0.3}
    with pytest.raises(RecipeError, match="did you mean 'width'"):
        april.resolve(recipe(tmp_path / "x", algorithm={"surrogate": {"type": "test_soft_clip", "widht": 1}}))


def test_evaluate_a_run_and_its_beginning(tmp_path: Path) -> None:
    def reward(text: str, sample: Sample, item: Mapping[str, Any]) -> float:
        return sample.id.member / 100 + float(item["answer"] in text)

    own, told = recipe(tmp_path / "run", training={"lr": 1e-3}), []
    trained = april.train(own, reward=reward, quiet=None)
    progress: Callable[[str, int, int], None] = lambda mode, done, total: told.append((mode, done, total))  # noqa: E731
    after = april.evaluate(trained.folder, reward=reward, overrides=["evaluation.num_samples=2"], progress=progress)
    assert [evaluation.mode for evaluation in after] == ["greedy", "sampled"]
    assert [evaluation.correct.shape for evaluation in after] == [(4, 1), (4, 2)]
    assert after[0].accuracy == trained.summary["accuracy_after_greedy"]
    assert ("greedy", 4, 4) in told and ("sampled", 8, 8) in told
    before = april.evaluate(own, reward=reward, overrides=["evaluation.num_samples=2"])
    assert before[0].accuracy == trained.summary["accuracy_before_greedy"]
    logprobs = [[sample.behaviour_logprobs.tolist() for sample in evaluation[1].samples] for evaluation in (before, after)]
    assert logprobs[0] != logprobs[1], "the trained policy is another one"


def test_a_notebook_sees_errors_as_exceptions(tmp_path: Path) -> None:
    with pytest.raises(april.AprilError, match="did you mean 'group_size'"):
        april.train(recipe(tmp_path / "run", batch={"group_siz": 4}))
    with pytest.raises(DataError, match="fails on every right answer"):
        april.train(recipe(tmp_path / "run"), reward=lambda text, sample, item: [1.0])  # type: ignore[arg-type,return-value]
    assert not (tmp_path / "run").exists()
