"""April from Python: the commands as functions, with rewards and data given as objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from april.config.load import Tree
from april.config.resolve import Resolved, resolve
from april.core.errors import CheckpointError, ModelError, RecipeError
from april.core.group import Reward
from april.core.sample import Sample
from april.core.template import literal
from april.models.policy import Policy
from april.run.build import Parts, build, model_path
from april.run.evaluate import Evaluation
from april.run.folders import run_folder
from april.run.loop import Result, Run, evaluate_parts, overwrite
from april.text.tokenizer import Tokenizer

RecipeLike = str | Path | Mapping[str, Any]
RewardFunction = Callable[[str, Sample, Mapping[str, Any]], Reward | float | Mapping[str, float]]


def train(
    recipe: RecipeLike,
    *,
    overrides: Sequence[str] = (),
    overlays: Sequence[str | Path] = (),
    reward: RewardFunction | None = None,
    items: Sequence[Mapping[str, Any]] | None = None,
    resume: bool = False,
    restart: bool = False,
    quiet: bool | None = True,
    on_step: Callable[[dict[str, Any]], None] = lambda _row: None,
) -> Result:
    """Train a policy; returns when the last step is done or the run was asked to stop.

    Args:
        recipe: name of a packaged recipe, path of a TOML file or of a run's folder, or a nested dict.
        overrides: dotted assignments such as "schedule.over_provision=2".
        overlays: further TOML files, each laid over the former.
        reward: judges (text, sample, item) in place of the recipe's reward; returns a number, named parts, or a `Reward`.
        items: problems in place of the recipe's task: dicts with `question` and `answer` (and anything else).
        resume: continue the run in the recipe's folder.
        restart: forget the run in that folder and begin again.
        quiet: False for the live view, True for one line a step, None for nothing.
        on_step: called with each row of metrics.

    Raises:
        AprilError: for whatever cannot work; says where, what was got and expected, and what to do.
    """
    resolved = resolve_recipe(recipe, overlays, overrides, items)
    if restart:
        overwrite(run_folder(resolved.recipe))
    return Run(resolved, resume=resume, quiet=quiet, on_step=on_step, reward=reward).run()


def evaluate(
    recipe: RecipeLike,
    *,
    model: str | Path | None = None,
    overrides: Sequence[str] = (),
    overlays: Sequence[str | Path] = (),
    reward: RewardFunction | None = None,
    items: Sequence[Mapping[str, Any]] | None = None,
    progress: Callable[[str, int, int], None] = lambda _mode, _done, _total: None,
) -> list[Evaluation]:
    """Accuracy of a policy on the held-out problems of a recipe, one `Evaluation` for each of its modes.

    Args:
        recipe, overrides, overlays, reward, items: as for `train`.
        model: policy to evaluate: a Hugging Face folder or hub name, or a run's folder, whose newest checkpoint is taken;
            the recipe's policy by default, and the run's where `recipe` is a run's folder.
        progress: told (mode, samples done, samples in all).

    Raises:
        AprilError: as `train`, and where the recipe names no mode.
    """
    if model is None and is_run(recipe):
        model = str(recipe)
    extra = [] if model is None else [f"model.path={json.dumps(policy_of(Path(model)))}"]
    resolved = resolve_recipe(recipe, overlays, [*overrides, *extra], items)
    if not resolved.recipe.evaluation.modes:
        raise RecipeError(
            "there is nothing to evaluate",
            where="evaluation.modes",
            got="no mode",
            expected="greedy, sampled, or both",
            hint="leave evaluation.modes out for both",
        )
    parts = build(resolved, reward=reward)
    try:
        return [evaluate_parts(parts, mode, _counted(parts, mode, progress)) for mode in parts.recipe.evaluation.modes]
    finally:
        parts.close()


def _counted(parts: Parts, mode: str, progress: Callable[[str, int, int], None]) -> Callable[[int], None]:
    total = len(parts.data.held_out) * (1 if mode == "greedy" else parts.recipe.evaluation.num_samples)
    return lambda done: progress(mode, done, total)


def export(model: str | Path, out: str | Path) -> Path:
    """Write a policy as an ordinary Hugging Face folder in float32, its adapters merged in where it has any.

    Args:
        model: a run's folder, whose newest checkpoint is taken; a checkpoint; a folder of adapters or of a model.
        out: a folder that does not exist yet, or is empty.

    Raises:
        CheckpointError: the folder is in use, or the run has no checkpoint.
        ModelError: there is no policy.
    """
    out, source = Path(out), model_path(policy_of(Path(model)))
    if not Path(source).is_dir():
        raise ModelError(
            "there is no such policy",
            where="MODEL",
            got=str(model),
            expected='a run\'s folder, a checkpoint, a folder of adapters or of a model, or "packaged"',
            hint="check the path, which is relative to the working directory; download a model of the hub first",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            "the folder of an export is in use",
            where=str(out),
            got="a folder with files in it" if out.is_dir() else "a file",
            expected="a new or an empty folder",
            hint="choose another folder, or empty this one",
        )
    tokenizer = Tokenizer.load(source)
    Policy.load(source).save(out, tokenizer.backend)
    return out


def is_run(recipe: RecipeLike) -> bool:
    """Whether a recipe is the folder of a run."""
    return isinstance(recipe, str | Path) and (Path(recipe) / "recipe.toml").is_file()


def policy_of(path: Path) -> str:
    """The folder of the model, or of its adapters, inside a run's folder or checkpoint; anything else is taken as it is.

    Raises:
        CheckpointError: a run that has no checkpoint.
    """
    checkpoints = sorted((path / "checkpoints").glob("step-*")) if (path / "checkpoints").is_dir() else []
    if is_run(path) and not checkpoints:
        raise CheckpointError(
            "a run has no checkpoint yet",
            where=str(path),
            got="no folder checkpoints/step-*",
            expected="a run that reached one",
            hint=f"`april train --resume {path}` goes on from its journal",
        )
    folder = checkpoints[-1] if checkpoints else path
    return str(next((folder / name for name in ("model", "adapter") if (folder / name).is_dir()), folder))


def resolve_recipe(
    recipe: RecipeLike,
    overlays: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    items: Sequence[Mapping[str, Any]] | None = None,
) -> Resolved:
    """Resolve a recipe that may be a run's folder, with items given directly; such a run stays in that folder."""
    if is_run(recipe):
        folder = json.dumps(literal(str(recipe)))
        recipe, overrides = Path(str(recipe)) / "recipe.toml", [f"out={folder}", *overrides]
    resolved = resolve(recipe, overlays, overrides)
    if items is None:
        return resolved
    values: Tree = {**resolved.values(), "task": {"type": "items", "items": [dict(item) for item in items]}}
    values.pop("evaluation_task", None)
    return resolve(values)
