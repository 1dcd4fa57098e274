"""From a recipe to prompts: what is trained on, and what is held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from april import registry
from april.config.recipe import Recipe
from april.core.prompt import Prompt
from april.core.template import fill
from april.environments.base import Item, Task, distinct, split, without
from april.rewards.base import Verifier
from april.rewards.build import build_reward
from april.text.prompts import build_prompts
from april.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Data:
    """Prompts for training and for evaluation, disjoint, and the task they come from."""

    task: Task
    train: list[Prompt]
    held_out: list[Prompt]

    @property
    def by_id(self) -> dict[str, Prompt]:
        """The training prompts by id."""
        return {prompt.id: prompt for prompt in self.train}


def held_apart(recipe: Recipe) -> tuple[list[Item], list[Item]]:
    """(training, held-out) items: no question and no prompt text of the second occurs in the first."""

    def text(item: Mapping[str, Any]) -> str:
        return fill(recipe.prompt.template, item, "prompt.template")

    items = task_of(recipe).load()
    evaluation = recipe.evaluation
    if recipe.evaluation_task is None:
        return split(items, evaluation.num_problems, evaluation.seed, key=text)
    held_out = distinct(recipe.evaluation_task.load(), evaluation.num_problems, evaluation.seed, key=text)
    return without(items, held_out, key=text), held_out


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe; its config is the task itself."""
    build = registry.builder("task", recipe.task.type)
    return build(**recipe.task.model_dump())  # type: ignore[no-any-return]


def load_data(recipe: Recipe, tokenizer: Tokenizer, context_tokens: int) -> Data:
    """Load, split and tokenise.

    Args:
        recipe: names the task, the template and how much is held out.
        tokenizer: of the policy.
        context_tokens: the policy's longest sequence; a prompt must leave room for at least one token.

    Raises:
        DataError: a prompt that is too long, or too few problems.
    """
    training, held_out = held_apart(recipe)
    limit = min(recipe.prompt.max_tokens, context_tokens - 1)
    train, held = (
        build_prompts(items, tokenizer, recipe.prompt.template, chat=recipe.prompt.chat, max_prompt_tokens=limit)
        for items in (training, held_out)
    )
    return Data(task_of(recipe), train, held)


def verifier_of(recipe: Recipe, task: Task) -> Verifier:
    """What judges the samples of a recipe."""
    return build_reward(recipe.reward if recipe.reward is not None else task.default_reward(), "reward")
