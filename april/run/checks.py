"""Everything that can be known to be wrong before anything expensive starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from april import registry
from april.algorithms.check import RunFacts, check, remarks
from april.config.recipe import Recipe
from april.config.schema import Config
from april.core.errors import DataError, ModelError, RecipeError, ResourceError
from april.core.group import Failure
from april.core.prompt import Prompt
from april.rewards.base import Verifier
from april.rewards.generative import JudgeReward
from april.rewards.judge import check_gold, judge_gold
from april.rewards.program import ProgramReward
from april.rollout.view import overlaps
from april.run.data import Data
from april.run.processes import any_child
from april.text.tokenizer import Tokenizer

R = TypeVar("R", bound=Config)

NUM_PROBED = 32
"""Items that the gold and round-trip checks look at."""
CHECKPOINT_BYTES_PER_PARAMETER = 16
"""Weights, two moments and the exported folder, in float32."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: its name and what was found."""

    name: str
    detail: str


def check_recipe(recipe: Recipe) -> list[Finding]:
    """What the recipe alone can contradict: batch arithmetic, algorithm against schedule and sampling."""
    facts = run_facts(recipe)
    check(recipe.algorithm, facts)
    check_judges(recipe)
    check_programs(recipe)
    check_routes(recipe)
    check_publishing(recipe)
    check_devices(recipe)
    check_placement(recipe)
    samples = recipe.batch.groups_per_step * recipe.batch.group_size
    if recipe.training.num_optimizer_steps > recipe.batch.groups_per_step:
        raise RecipeError(
            "a batch cannot be cut into more mini-batches than it has groups",
            where="training.num_optimizer_steps, batch.groups_per_step",
            got=f"{recipe.training.num_optimizer_steps} > {recipe.batch.groups_per_step}",
            expected="at least one group for each mini-batch",
            hint="lower the one or raise the other",
        )
    shape = f"{recipe.batch.groups_per_step} groups x {recipe.batch.group_size} = {samples} samples per update"
    detail = f"{shape}, {recipe.steps} updates"
    columns = f"columns {', '.join(sorted(recipe.algorithm.requires))}"
    return [Finding("batch", detail), Finding("algorithm", "; ".join([columns, *remarks(recipe.algorithm, facts)]))]


def run_facts(recipe: Recipe) -> RunFacts:
    """What the checks of an algorithm want to know of a recipe."""
    schedule = registry.builder("schedule", recipe.schedule.type)(recipe.schedule)
    noisy = getattr(recipe.engine, "noise", None) is not None  # then no token is of the policy that is trained
    facts = RunFacts(
        group_size=recipe.batch.group_size,
        greedy_members=recipe.batch.greedy_members,
        stale_tokens=schedule.max_lag_steps > 0 or noisy,
        has_reference=recipe.model.reference is not None,
        records_entropy=recipe.sampling.entropy,
        temperature=recipe.sampling.temperature,
        top_p=recipe.sampling.top_p,
        top_k=recipe.sampling.top_k,
        max_new_tokens=recipe.sampling.max_new_tokens,
        num_optimizer_steps=recipe.training.num_optimizer_steps,
        num_epochs=recipe.training.num_epochs,
        interpolates=recipe.training.proximal == "interpolate",
        together=recipe.batch.together,
    )
    bounds = [name for name in ("max_lag_steps", "delay_steps") if name in type(recipe.schedule).model_fields]
    stale = "engine.noise" if noisy and not schedule.max_lag_steps else f"schedule.{(*bounds, 'type')[0]}"
    return replace(facts, keys=(*facts.keys, ("stale_tokens", stale)))


def check_routes(recipe: Recipe) -> None:
    """Routes are recorded where they are replayed, and only there.

    Raises:
        RecipeError: one without the other.
    """
    recorded, replayed = bool(getattr(recipe.engine, "record_routes", False)), recipe.training.replay_routes
    if recorded == replayed:
        return
    hint = "set both, or neither" if recipe.engine.type == "embedded" else 'only engine.type = "embedded" records routes'
    raise RecipeError(
        "routes are replayed that nobody records" if replayed else "routes are recorded that nobody replays",
        where="engine.record_routes, training.replay_routes",
        got=f"{str(recorded).lower()}, {str(replayed).lower()}",
        expected="both or neither",
        hint=hint,
    )


def check_publishing(recipe: Recipe) -> None:
    """Weights are published between processes, and a broadcast gives up before anybody is given up for waiting for it.

    Raises:
        RecipeError: one process only, a transport besides the runtime's own, a broadcast that rolls, or deadlines that cross.
    """
    options, ray = recipe.publishing, recipe.backend == "ray"
    if options.transport == "broadcast" and recipe.schedule.type == "rolling":
        raise RecipeError(
            "a broadcast reaches all engines at once, and a rolling update one after the other",
            where="publishing.transport, schedule.type",
            got="broadcast, rolling",
            expected="another transport, or another schedule",
            hint='publishing.transport = "shared_memory", or schedule.type = "bounded_async"',
        )
    if options != type(options)() and (ray or not any_child(recipe)):
        raise RecipeError(
            "weights go through Ray's object store" if ray else "trainer and engine are in one process, and nothing is published",
            where="publishing",
            got=f'transport = "{options.transport}"',
            expected="a trainer or an engine in a local child process",
            hint="leave publishing out" if ray else 'set engine.process = "child" or training.process = "child", or leave it out',
        )
    limit_s = min(recipe.limits.engine_silence_s, recipe.limits.publish_s)
    if options.transport == "broadcast" and 2 * options.deadline_s >= limit_s:
        raise RecipeError(
            "engines that wait for a broadcast would be given up before the one that it waits for",
            where="publishing.deadline_s, limits.engine_silence_s, limits.publish_s",
            got=f"{options.deadline_s:g} s, {recipe.limits.engine_silence_s:g} s, {recipe.limits.publish_s:g} s",
            expected="both limits more than twice the deadline",
            hint=f"set publishing.deadline_s to less than {limit_s / 2:g}",
        )


def check_devices(recipe: Recipe) -> None:
    """Engines on the trainer's devices generate only while it does not compute.

    Raises:
        RecipeError: the schedule generates during an update.
    """
    schedule = registry.builder("schedule", recipe.schedule.type)(recipe.schedule)
    if shares_devices(recipe) and overlaps(schedule):
        raise overlap_refused(recipe, "generates during an update")


def shares_devices(recipe: Recipe) -> bool:
    """Whether engines lie on the trainer's devices."""
    return recipe.backend == "ray" and recipe.placement.devices == "shared"


def overlap_refused(recipe: Recipe, told: str) -> RecipeError:
    """The error for engines that have work in an update on the trainer's devices."""
    return RecipeError(
        "engines that share devices with the trainer cannot generate while it computes",
        where="placement.devices, schedule.type",
        got=f"shared, {recipe.schedule.type}, which {told}",
        expected="a schedule that waits for the update, such as sync or april; or devices of their own",
        hint='set placement.devices = "split", or another schedule.type',
    )


def check_placement(recipe: Recipe) -> None:
    """Only Ray places processes.

    Raises:
        RecipeError: placement without it.
    """
    if recipe.backend == "ray" or recipe.placement == type(recipe.placement)():
        return
    given = recipe.placement.model_dump(exclude_defaults=True)
    raise RecipeError(
        "placement has no effect without Ray",
        where=", ".join(f"placement.{key}" for key in given),
        got=f'backend = "{recipe.backend}"',
        expected='backend = "ray"',
        hint='set backend = "ray", or leave placement out',
    )


def check_judges(recipe: Recipe) -> None:
    """A judge's request must end before the judgement that it is part of.

    Raises:
        RecipeError: a request may take longer than `scoring.timeout_s` allows for all of it.
    """
    for path, judge in rewards_of(recipe.reward, JudgeReward, "reward"):
        if judge.url is not None and judge.timeout_s > recipe.scoring.timeout_s:
            raise RecipeError(
                "a judge's request may outlive the judgement that it is part of",
                where=f"{path}.timeout_s, scoring.timeout_s",
                got=f"{judge.timeout_s:g} s, {recipe.scoring.timeout_s:g} s",
                expected="the whole judgement takes longer than one request",
                hint=f"set scoring.timeout_s to {judge.timeout_s * (judge.retries + 1):g}, for {judge.retries} further attempts, "
                f"or {path}.timeout_s to less than {recipe.scoring.timeout_s:g}",
            )


def check_programs(recipe: Recipe) -> None:
    """The tests of a program must end before the judgement that they are part of.

    Raises:
        RecipeError: a program that never ends would cost its sample, and earn nothing for not ending.
    """
    for path, program in rewards_of(recipe.reward, ProgramReward, "reward"):
        if program.timeout_s >= recipe.scoring.timeout_s:
            raise RecipeError(
                "the tests of a program may outlive the judgement that they are part of",
                where=f"{path}.timeout_s, scoring.timeout_s",
                got=f"{program.timeout_s:g} s, {recipe.scoring.timeout_s:g} s",
                expected="the whole judgement takes longer than the tests",
                hint=f"set scoring.timeout_s to {program.timeout_s + 1:g}",
            )


def rewards_of(reward: object, kind: type[R], path: str) -> Iterator[tuple[str, R]]:
    """Every reward of a kind in a reward, however deep, with its recipe path."""
    if isinstance(reward, kind):
        yield path, reward
    elif isinstance(reward, Config):
        for name in type(reward).model_fields:
            yield from rewards_of(getattr(reward, name), kind, f"{path}.{name}")
    elif isinstance(reward, Mapping):
        for name, part in reward.items():
            yield from rewards_of(part, kind, f"{path}.{name}")


def min_rewarded(recipe: Recipe) -> int:
    """Members with a reward that a group needs to be of use: two where they are compared with each other."""
    return min(2, int(recipe.algorithm.advantage.min_group_size))


def check_data(recipe: Recipe, data: Data, tokenizer: Tokenizer, context_tokens: int) -> list[Finding]:
    """Sizes and lengths of the data set against the recipe."""
    if len(data.train) < recipe.batch.groups_per_step:
        raise DataError(
            "the data set is smaller than one batch",
            where="task, batch.groups_per_step",
            got=f"{len(data.train)} prompts after holding {len(data.held_out)} out",
            expected=f"at least {recipe.batch.groups_per_step} different prompts",
            hint="make the data set larger, hold fewer problems out (evaluation.num_problems), or lower batch.groups_per_step",
        )
    longest = max(len(prompt.token_ids) for prompt in (*data.train, *data.held_out))
    total = longest + recipe.sampling.max_new_tokens
    if total > context_tokens:
        raise RecipeError(
            "a prompt and its response do not fit the context",
            where="sampling.max_new_tokens",
            got=f"{longest} + {recipe.sampling.max_new_tokens} = {total} tokens",
            expected=f"at most {context_tokens}",
            hint=f"set sampling.max_new_tokens to at most {max(1, context_tokens - longest)}, or shorten the prompts",
        )
    kv_tokens = getattr(recipe.engine, "kv_tokens", None)
    if kv_tokens is not None and total > kv_tokens:
        raise RecipeError(
            "a sample alone may need more KV memory than there is",
            where="engine.kv_tokens, sampling.max_new_tokens",
            got=f"{longest} + {recipe.sampling.max_new_tokens} = {total} tokens of prompt and response",
            expected=f"at most {kv_tokens}",
            hint=f"set engine.kv_tokens to at least {total}, or lower sampling.max_new_tokens",
        )
    check_items(recipe, data.train)
    broken = tokenizer.round_trip(prompt.text for prompt in _probes(data.train))
    if broken:
        raise ModelError(
            "the tokenizer changes the text of a prompt",
            where="model.path",
            got=f"{broken[0]!r} -> {tokenizer.decode(tokenizer.encode(broken[0]), keep_special=True)!r}",
            expected="decode(encode(text)) == text",
            hint="change prompt.template so that it uses what the tokenizer knows",
        )
    return [
        Finding("data", f"{len(data.train)} prompts to train on, {len(data.held_out)} held out"),
        Finding(
            "lengths", f"longest prompt {longest} + response {recipe.sampling.max_new_tokens} tokens, context {context_tokens}"
        ),
        Finding("tokenizer", f"{min(NUM_PROBED, len(data.train))} prompts survive encoding and decoding"),
    ]


def check_items(recipe: Recipe, prompts: list[Prompt]) -> None:
    """Numbers of the items that atoms read, and the one that keeps prompts together, are in the data."""
    wanted = {f"algorithm.{path}": atom.needs for path, atom in recipe.algorithm.atoms()}
    wanted["batch.together"] = {f"item.{recipe.batch.together}"} if recipe.batch.together is not None else set()
    for path, columns in wanted.items():
        for column in sorted(name for name in columns if name.startswith("item.")):
            name = column.removeprefix("item.")
            if not any(name in prompt.item for prompt in prompts):
                raise DataError(
                    "no problem of the data set has a number that is read",
                    where=f"{path}, task",
                    got=f"no {name!r} in any of {len(prompts)} items",
                    expected=f"items with the field {name!r}",
                    hint=f"add {name!r} to the data, or name another field in {path}",
                )


def check_gold_answers(recipe: Recipe, data: Data, verifier: Verifier, *, custom: bool = False) -> Finding:
    """The reward must accept the answers that the task knows to be right; a `custom` one must at least judge them."""
    probes = [(prompt, gold) for prompt in _probes(data.train) if (gold := data.task.gold(prompt.item)) is not None]
    if not probes:
        return Finding("reward", "the task knows no right answers to try it on")
    wrong = check_gold(verifier, probes, recipe.scoring.timeout_s)
    if len(wrong) == len(probes) and custom:
        return _check_judged(recipe, probes, verifier)
    if len(wrong) == len(probes):
        raise DataError(
            "the reward accepts none of the right answers",
            where="reward, task",
            got=wrong[0],
            expected=f"at least one of {len(probes)} judged correct",
            hint="reward.answer_pattern must find the answer, and task.gold_template write it as the policy would",
        )
    detail = f"{len(probes) - len(wrong)} of {len(probes)} right answers judged correct"
    return Finding("reward", detail + (f"; first refused: {wrong[0]}" if wrong else ""))


def _check_judged(recipe: Recipe, probes: list[tuple[Prompt, str]], verifier: Verifier) -> Finding:
    """Somebody's own reward may call nothing correct, but it must give rewards."""
    failures = [
        outcome for _, _, outcome in judge_gold(verifier, probes, recipe.scoring.timeout_s) if isinstance(outcome, Failure)
    ]
    if len(failures) == len(probes):
        raise DataError(
            "the reward fails on every right answer",
            where="reward",
            got=failures[0].reason,
            expected="one number, named parts, or an april.Reward for each response",
            hint="correct the function: it is called with (text, sample, item)",
        )
    return Finding("reward", f"none of {len(probes)} right answers judged correct (a reward of 1 or more)")


def check_disk(out: Path, num_parameters: int, keep: int, free_bytes: Callable[[Path], int] | None = None) -> Finding:
    """There must be room for the checkpoints that are kept, and one that is being written."""
    wanted = num_parameters * CHECKPOINT_BYTES_PER_PARAMETER * (keep + 1) + (64 << 20)
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = (free_bytes or (lambda path: shutil.disk_usage(path).free))(existing)
    if free < wanted:
        raise ResourceError(
            "there is too little room on the disk",
            where=str(out),
            got=f"{free / 2**20:.0f} MiB free",
            expected=f"{wanted / 2**20:.0f} MiB for {keep + 1} checkpoints",
            hint="free some room, choose another folder (out=...), or keep fewer checkpoints (checkpoint.keep=1)",
        )
    return Finding("disk", f"{free / 2**30:.1f} GiB free, {wanted / 2**20:.0f} MiB wanted for checkpoints")


def _probes(prompts: list[Prompt]) -> list[Prompt]:
    return prompts[:: max(1, len(prompts) // NUM_PROBED)][:NUM_PROBED]
