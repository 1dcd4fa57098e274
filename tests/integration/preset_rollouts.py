"""Rollouts of the packaged policy with all that presets may read, and two updates of any preset on them."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.filters import first_reason
from april.algorithms.losses.compose import Algorithm, credit, policy_loss, stage
from april.algorithms.spec import AlgorithmConfig
from april.config.resolve import resolve
from april.core.group import Batch, Group, Reward
from april.core.metric import values
from april.models.policy import Policy
from april.rewards.build import build_reward
from april.rewards.judge import judge
from april.run.build import build, load_policy
from april.run.checks import check_recipe
from april.training.batch import TrainingBatch, assemble, trainable
from april.training.config import TrainerConfig, ValueConfig
from april.training.single import Trainer

EASY = "{ name = 'chain_sum', weight = 1.0, options = { min_terms = 4, max_terms = 5, min_digits = 1, max_digits = 1 } }"
SIZE = ["batch.groups_per_step=6", "sampling.max_new_tokens=18", "sampling.entropy=true"]
GROUPS = ["batch.group_size=8", "batch.greedy_members=1", "algorithm.preset=remax"]
PROVIDED = [*SIZE, "batch.group_size=8", "model.reference=packaged", "schedule.type=delayed", "batch.together=query"]
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
    """Six groups of eight sampled members and a greedy one."""
    task = ["schedule.type=sync", f"task.mixture=[{EASY}]", f"out='{folder / 'run'}'", "steps=1"]
    parts = build(resolve("quickstart", overrides=[*SIZE, *GROUPS, *task]))
    try:
        groups = parts.driver.next_batch().groups
    finally:
        parts.close()
    return tuple(with_numbers(group, index) for index, group in enumerate(groups))


def cut(group: Group, size: int, greedy: int) -> Group:
    """The first members of a group, and its greedy one if it is asked for."""
    if greedy:
        assert size == len(group.sampled.samples)
        return group
    return Group(group.id, group.samples[:size], group.outcomes[:size])


def spun(loops: int) -> str:
    """A right program that counts in vain."""
    return f"```python\ndef f(x):\n    for _ in range({loops}):\n        pass\n    return 2 * x\n```"


WRONG = "```python\ndef f(x): return x\n```"
THOUGHT = "<think>so</think>"
PROGRAMS = [
    THOUGHT + spun(1), spun(1), spun(2_000_000), WRONG, THOUGHT + WRONG, "```python\nf = 1 / 0\n```",
    "```python\ndef f(x) return\n```", "I do not know",
]  # fmt: skip
ASKED, FINAL = "<intermediate_sql>{}</intermediate_sql>", "<final_sql>{}</final_sql>"
QUERIES = [
    ASKED.format("SELECT * FROM t") + FINAL.format("SELECT a FROM t"), FINAL.format("SELECT a FROM t"),
    FINAL.format("SELECT t.a FROM t"), FINAL.format("SELECT b FROM t"), FINAL.format("SELECT c FROM t"),
    ASKED.format("SELECT 1") + FINAL.format("SELECT a FROM t"), FINAL.format("SELECT a FROM t") + " is it", "I do not know",
]  # fmt: skip
JUDGED: dict[str, tuple[Any, list[str]]] = {
    "acecode": ("program", PROGRAMS),
    "afterburner": ("program", PROGRAMS),
    "econprover": ({"type": "patterns", "reward": "program", "patterns": {"reasoning": "<think>"}}, PROGRAMS),
    "reex_sql": ("sql", QUERIES),
}
"""Presets whose rewards run something: the reward, and what the members are taken to have answered."""
EXECUTED_ITEM = {
    "tests": ["assert f(2) == 4"], "reference_time_s": 1e-3, "baseline_time_s": 1.0, "baseline_passes": 1,
    "schema": "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 2), (3, 4);", "answer": "SELECT a FROM t",
}  # fmt: skip


def executed(preset: str, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups with what the preset's own reward says of other answers, in another order in each group."""
    if preset not in JUDGED:
        return groups
    spec, texts = JUDGED[preset]
    sample = dataclasses.replace(groups[0].samples[0], prompt=dataclasses.replace(groups[0].prompt, item=EXECUTED_ITEM))
    outcomes = [judge(build_reward(spec), text, sample, 60.0) for text in texts]
    assert all(isinstance(outcome, Reward) for outcome in outcomes), outcomes

    def answered(group: Group, turn: int) -> Group:
        prompt = dataclasses.replace(group.prompt, item={**group.prompt.item, **EXECUTED_ITEM})
        samples = tuple(dataclasses.replace(sample, prompt=prompt) for sample in group.samples)
        return Group(group.id, samples, tuple(outcomes[(index + turn) % len(outcomes)] for index in range(len(samples))))

    return tuple(answered(group, turn) for turn, group in enumerate(groups))


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
    sized = [cut(group, recipe.batch.group_size, recipe.batch.greedy_members) for group in groups]
    kept = tuple(group for group in sized if first_reason(config.filter, group.sampled) is None)
    options = TrainerConfig(lr=3e-3, num_optimizer_steps=1 + len(several), value=ValueConfig(lr=1e-3))
    trainer = Trainer(copy.deepcopy(start), config, options, reference=reference)
    trainer.version = 1
    trainer._steps_at = [0, 1]
    rows = [values(trainer.update(Batch(step, step, kept))) for step in (1, 2)]
    composed: Any = trainable(Batch(1, 1, kept), config.requires)
    for compose in Algorithm.of(config).compose:
        composed = compose(composed)
    data = assemble(Batch(1, 1, kept), tuple(composed), config.requires)
    extras: Mapping[str, Tensor] = {
        "reference": data.tokens["behaviour"] - 0.1,
        "value": torch.full_like(data.tokens["reward"], 0.5),
    }
    return Outcome(config, rows, data, credit(Algorithm.of(config), data.tokens.with_columns(**extras)), len(groups) - len(kept))


def pulls(outcome: Outcome, ratios: float | Tensor, moved: float = 1.0) -> Tensor:
    """(N,): the pull of the policy loss at each token's log-prob, over that where nothing has moved; nan where the latter is 0.

    Args:
        outcome: whose loss, credit and rollouts.
        ratios: current over behaviour, of all tokens or (N,).
        moved: proximal over behaviour.
    """
    algorithm = Algorithm.of(outcome.config.model_copy(update={"penalties": {}, "objectives": {}}))
    behaviour = outcome.tokens["behaviour"]

    def gradient(ratios: Tensor, moved: float) -> Tensor:
        current = (behaviour + ratios.log()).requires_grad_()
        columns = {"proximal": behaviour + math.log(moved), "current": current.detach()}
        loss = policy_loss(algorithm, current, stage(algorithm, outcome.tokens.with_columns(**columns)))
        return torch.autograd.grad(loss.total, current)[0]

    still = gradient(torch.ones_like(behaviour), 1.0)
    return gradient(torch.ones_like(behaviour) * ratios, moved) / torch.where(still == 0, torch.nan, still)


def _surrogate(preset: str) -> str:
    return str(resolve("quickstart", overrides=[f"algorithm.preset={preset}", *PROVIDED]).recipe.algorithm.surrogate.type)  # type: ignore[attr-defined]
