"""Baselines measured before training: what a policy earns on each problem, written into the problems themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from april.config.resolve import resolve
from april.core.errors import DataError
from april.core.group import Reward
from april.run.build import Parts, build, sampling_spec
from april.run.evaluate import evaluate


def measure_baselines(
    recipe: str | Path,
    out: str | Path,
    *,
    mode: Literal["greedy", "sampled"] = "greedy",
    num_samples: int = 4,
    num_problems: int | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[int], None] = lambda _done: None,
) -> list[dict[str, Any]]:
    """Answer the training problems of a recipe with its policy, and write them down with their mean reward as `baseline`.

    A run with `task = { type = "jsonl", path = OUT }` and the same prompt and reward then has the column "item.baseline":
    one greedy answer is the baseline of ReMax under the policy as it starts, several sampled ones are the anchor of PVPO.

    Args:
        recipe: whose task, prompt, reward, sampling, engine and policy are used.
        out: JSON-lines file, one problem a line.
        mode: one greedy answer, or `num_samples` at the recipe's temperature.
        num_samples: answers to each problem in sampled mode.
        num_problems: the first so many training problems; None for all.
        overrides: as for `april train`.
        progress: told how many answers are done.

    Returns:
        The problems as written.

    Raises:
        DataError: a problem of which no answer could be judged.
    """
    parts = build(resolve(recipe, overrides=list(overrides)))
    try:
        items = _measured(parts, mode, num_samples, num_problems, progress)
    finally:
        parts.close()
    Path(out).write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return items


def _measured(
    parts: Parts, mode: str, num_samples: int, num_problems: int | None, progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    prompts = parts.data.train[:num_problems]
    spec, timeout_s = sampling_spec(parts.recipe, parts.tokenizer), parts.recipe.scoring.timeout_s
    measured = evaluate(
        parts.engine, prompts, parts.verifier, parts.tokenizer.decode, spec,
        mode=mode, num_samples=num_samples, timeout_s=timeout_s, progress=progress,
    )  # fmt: skip
    each = len(measured.outcomes) // len(prompts)
    items = []
    for index, prompt in enumerate(prompts):
        outcomes = measured.outcomes[index * each : (index + 1) * each]
        values = [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]
        if not values:
            raise DataError("no answer to a problem could be judged", where=prompt.id, got=outcomes[0], expected="a reward")
        gold = parts.data.task.gold(prompt.item)
        solution = {} if gold is None else {"solution": gold}
        items.append({**prompt.item, **solution, "baseline": sum(values) / len(values)})
    return items
