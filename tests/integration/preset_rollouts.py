"""Rollouts of the packaged policy with all that presets may read, and two updates of any preset on them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.filters import first_reason
from april.algorithms.losses.compose import Algorithm, credit
from april.algorithms.spec import AlgorithmConfig
from april.config.resolve import resolve
from april.core.group import Batch, Group, Reward
from april.core.metric import values
from april.models.policy import Policy
from april.run.build import build, load_policy
from april.run.checks import check_recipe
from april.training.batch import TrainingBatch, assemble
from april.training.config import TrainerConfig, ValueConfig
from april.training.single import Trainer

EASY = "{ name = 'chain_sum', weight = 1.0, options = { min_terms = 4, max_terms = 5, min_digits = 1, max_digits = 1 } }"
SIZE = ["batch.groups_per_step=6", "batch.group_size=8", "sampling.max_new_tokens=18", "sampling.entropy=true"]
PROVIDED = [*SIZE, "model.reference=packaged", "schedule.type=delayed", "batch.together=query"]
LINE = 35
"""The packaged policy's token of a line break, at which steps and nodes of a tree begin."""


def parts_of(reward: Reward, tokens: int, member: int) -> dict[str, float]:
    """What judges, tools and test runs would say of a response: made up from its length and its place in the group."""
    half, third = float(member % 2), float(member % 3)
    named = {
        "cost": 0.01 * tokens, "time_s": 0.1 * tokens, "compiled": 1.0, "ran": 1.0, "flawed": half, "num_passes": float(member),
        "length_tokens": float(tokens), "tool_error": third, "answer_format": 0.0, "accuracy": float(reward.correct),
        "format": half, "execution": float(reward.correct), "exact": half, "entity": third / 2, "exploration": half,
        "correctness": float(reward.correct), "reasoning": half, "style": third / 2,
    }  # fmt: skip
    return named | {f"{name}_confidence": 0.5 + 0.1 * third for name in ("correctness", "reasoning", "style")}


def with_numbers(group: Group, index: int) -> Group:
    """The group with parts of rewards, and with numbers of its item.

    Two groups are judged otherwise than by their answers, so that all sorts occur: in one the short guesses are right and not
    what was worked out, in another everything is.
    """
    numbers = {"query": index // 2, "meta": index % 2, "budget": 8.0 + 16 * (index % 2), "baseline": 0.4}
    numbers |= {"reference_time_s": 0.4, "baseline_time_s": 5.0, "baseline_passes": 1}
    prompt = dataclasses.replace(group.prompt, item={**group.prompt.item, **numbers})
    outcomes = []
    for sample, outcome in zip(group.samples, group.outcomes, strict=True):
        lenient = {3: len(sample) < 8, 4: True}.get(index)
        judged = outcome if lenient is None else Reward(float(lenient), lenient)
        assert isinstance(judged, Reward)
        outcomes.append(dataclasses.replace(judged, parts=parts_of(judged, len(sample), sample.id.member)))
    return Group(group.id, tuple(dataclasses.replace(sample, prompt=prompt) for sample in group.samples), tuple(outcomes))


def rollouts(folder: Path) -> tuple[Group, ...]:
    """Six groups of eight."""
    parts = build(
        resolve(
            "quickstart", overrides=[*SIZE, "schedule.type=sync", f"task.mixture=[{EASY}]", f"out='{folder / 'run'}'", "steps=1"]
        )
    )
    try:
        groups = parts.driver.next_batch().groups
    finally:
        parts.close()
    return tuple(with_numbers(group, index) for index, group in enumerate(groups))


def cut(group: Group, size: int) -> Group:
    """The first members of a group."""
    return Group(group.id, group.samples[:size], group.outcomes[:size])


def moved_policy(scale: float, seed: int) -> Policy:
    """The packaged policy a little off where it was."""
    policy, _ = load_policy(resolve("quickstart").recipe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return policy


@dataclass
class Outcome:
    """What two updates of a preset came to.

    Attributes:
        rows: metrics of each update.
        data: what went into the first one, filters and composers passed.
        tokens: with the preset's credit; values are half a reward everywhere.
        num_filtered: groups that a filter dropped.
    """

    config: AlgorithmConfig
    rows: list[dict[str, float]]
    data: TrainingBatch
    tokens: TokenBatch
    num_filtered: int

    def sample(self, column: str) -> Tensor:
        """(S,): a column at the first token of each sample."""
        return self.tokens.layout.first(self.tokens[column])

    def most(self, key: str) -> float:
        """The largest value of a metric."""
        return max(row.get(key, 0.0) for row in self.rows)


def outcome_of(preset: str, groups: tuple[Group, ...], start: Policy, reference: Policy, extra: list[str]) -> Outcome:
    """Check a preset's recipe, and train it twice from `start` on the groups, whose tokens are one and two versions old."""
    several = [] if "plain" in _surrogate(preset) else ["training.num_optimizer_steps=2"]
    recipe = resolve("quickstart", overrides=[f"algorithm.preset={preset}", *PROVIDED, *several, *extra]).recipe
    assert check_recipe(recipe)
    config: Any = recipe.algorithm
    sized = [cut(group, recipe.batch.group_size) for group in groups]
    kept = tuple(group for group in sized if first_reason(config.filter, group) is None)
    options = TrainerConfig(lr=3e-3, num_optimizer_steps=1 + len(several), value=ValueConfig(lr=1e-3))
    trainer = Trainer(copy.deepcopy(start), config, options, reference=reference)
    trainer.version = 1
    trainer._steps_at = [0, 1]
    rows = [values(trainer.update(Batch(step, step, kept))) for step in (1, 2)]
    composed: Any = kept
    for compose in Algorithm.of(config).compose:
        composed = compose(composed)
    data = assemble(Batch(1, 1, kept), tuple(composed), config.requires)
    extras: Mapping[str, Tensor] = {
        "reference": data.tokens["behaviour"] - 0.1,
        "value": torch.full_like(data.tokens["reward"], 0.5),
    }
    return Outcome(config, rows, data, credit(Algorithm.of(config), data.tokens.with_columns(**extras)), len(groups) - len(kept))


def _surrogate(preset: str) -> str:
    return str(resolve("quickstart", overrides=[f"algorithm.preset={preset}", *PROVIDED]).recipe.algorithm.surrogate.type)  # type: ignore[attr-defined]
