"""What a run says about its data, for the checks of an algorithm. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from april.core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run says about its data, with the recipe keys that say it.

    Attributes:
        group_size: samples of each prompt.
        greedy_members: greedy ones beside them.
        stale_tokens: whether tokens of older versions can reach the learner.
        has_reference: whether there is a reference policy.
        records_entropy: whether the engine records entropies.
        temperature, top_p, top_k: of the training rollouts.
        max_new_tokens: response budget, or None when it varies.
        num_optimizer_steps: mini-batches of each batch, each with its optimiser step.
        num_epochs: passes over each batch.
        interpolates: whether the proximal policy lies between the behaviour and the current one.
        together: number of the item that prompts of one question share, where these are handed out one after another.
        keys: recipe path of each of the above, for messages.
    """

    group_size: int
    greedy_members: int = 0
    stale_tokens: bool = False
    has_reference: bool = False
    records_entropy: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    num_optimizer_steps: int = 1
    num_epochs: int = 1
    interpolates: bool = False
    together: str | None = None
    keys: tuple[tuple[str, str], ...] = (
        ("group_size", "batch.group_size"),
        ("greedy_members", "batch.greedy_members"),
        ("stale_tokens", "schedule.max_lag_steps"),
        ("has_reference", "model.reference"),
        ("records_entropy", "sampling.entropy"),
        ("temperature", "sampling.temperature"),
        ("top_p", "sampling.top_p"),
        ("top_k", "sampling.top_k"),
        ("max_new_tokens", "sampling.max_new_tokens"),
        ("num_optimizer_steps", "training.num_optimizer_steps"),
        ("num_epochs", "training.num_epochs"),
        ("interpolates", "training.proximal"),
        ("together", "batch.together"),
    )

    def key(self, fact: str) -> str:
        """The recipe path that sets a fact."""
        return dict(self.keys).get(fact, fact)


def refuse(what: str, *keys: str, got: object, hint: str, expected: str | None = None) -> NoReturn:
    """Raise for keys that disagree.

    Raises:
        RecipeError: always.
    """
    raise RecipeError(what, where=", ".join(keys), got=got, expected=expected, hint=hint)
