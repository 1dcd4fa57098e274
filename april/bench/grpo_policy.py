"""Policies of other sizes for the GRPO benchmark: made once by a warm start on worked sums, and kept in a folder.

Random weights would give lengths that say nothing and no accuracy to compare. The warm start of the packaged policy gives both:
a policy that works sums out line by line has lengths that grow with the square of the number of terms, so equal sums give
even lengths and the quickstart's sums long-tailed ones. Guessing at once is shown often enough to leave something to learn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from april.bench.shapes import SHAPES, BenchShape
from april.core.errors import DataError

if TYPE_CHECKING:
    from april.config.warm_start import WarmStartRecipe

MADE_POLICIES = ("3m",)
"""Shapes of `april bench engine` that the benchmark makes policies of; the vocabulary is that of the packaged policy."""

GUESS_WEIGHT = 0.3
"""Share of answers without working, so that the median response to the quickstart's sums has about 20 tokens."""

_SKILL_STAGES, _HABIT_STAGE = ("short", "skill"), "habit"
_SAY_EVERY_STEPS = 100


def start_policy(model: str, workload: str, folder: Path, threads: int, say: Callable[[str], None]) -> str:
    """The policy that a workload starts from.

    Args:
        model: one of `MADE_POLICIES`; anything else is the policy's own name or folder.
        workload: "even" starts from a policy that always works sums out, others from one that also guesses.
        folder: where made policies are kept.
        threads: CPU threads of a warm start.
        say: told of its progress.
    """
    if model not in MADE_POLICIES:
        return model
    skilled = _made(skill_recipe(SHAPES[model], threads), folder / f"{model}-works", say)
    if workload == "even":
        return str(skilled)
    return str(_made(habit_recipe(skilled, threads), folder / f"{model}-works-and-guesses", say))


def skill_recipe(shape: BenchShape, threads: int) -> WarmStartRecipe:
    """The packaged policy's warm start without its habit, for another shape."""
    sizes = {name: shape.hf_config()[name] for name in _SHAPE_KEYS}
    overrides = [f"model.{name}={value}" for name, value in sizes.items()]
    recipe = _sums((*overrides, f"threads={threads}"))
    return recipe.model_copy(update={"stages": tuple(stage for stage in recipe.stages if stage.name in _SKILL_STAGES)})


def habit_recipe(skilled: Path, threads: int) -> WarmStartRecipe:
    """The habit of the packaged policy on top of this one, but guessing less often."""
    recipe = _sums((f"threads={threads}",))
    stage = next(stage for stage in recipe.stages if stage.name == _HABIT_STAGE)
    weights = [GUESS_WEIGHT if way.template is not None else 1 - GUESS_WEIGHT for way in stage.completions]
    ways = tuple(way.model_copy(update={"weight": weight}) for way, weight in zip(stage.completions, weights, strict=True))
    stages = (stage.model_copy(update={"completions": ways}),)
    return recipe.model_copy(update={"model": str(skilled), "tokenizer": None, "stages": stages})


_SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def _sums(overrides: tuple[str, ...]) -> WarmStartRecipe:
    from april.run.warm_start import resolve_warm_start

    return resolve_warm_start("sums", overrides)


def _made(recipe: WarmStartRecipe, folder: Path, say: Callable[[str], None]) -> Path:
    """The folder, after making the policy where it is not there yet."""
    from april.run.warm_start import warm_start

    note = folder / "warm_start.json"
    wanted = _as_json(recipe)
    if folder.exists():
        if not note.exists() or json.loads(note.read_text()) != wanted:
            raise DataError("this policy was made by another warm start", where=str(folder), hint="remove the folder")
        return folder
    say(f"{folder.name} is made now, and kept in {folder}")

    def progress(stage: str, step: int, steps: int, done: Any) -> None:
        if step % _SAY_EVERY_STEPS == 0 or step == steps:
            say(f"{folder.name}, {stage}: step {step} of {steps}, loss {done.loss:.3f}")

    # The folder takes its name when it is whole.
    part = folder.with_name(f"{folder.name}.part")
    _remove(part)
    summary = warm_start(recipe, part, progress)
    (part / note.name).write_text(json.dumps(wanted) + "\n")
    part.rename(folder)
    say(f"{folder.name}: {summary['parameters'] / 1e6:.1f} M parameters in {summary['wall_s']:.0f} s")
    return folder


def _remove(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def _as_json(recipe: WarmStartRecipe) -> dict[str, Any]:
    """What the result depends on: neither the number of threads nor the place of the policy it starts from."""
    tree = recipe.model_dump(mode="json", exclude={"threads"})
    if isinstance(recipe.model, str):
        tree["model"] = Path(recipe.model).name
    return tree
