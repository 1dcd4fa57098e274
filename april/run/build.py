"""From a recipe to running parts: the only file that knows all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from april import registry
from april.algorithms.filters import first_reason
from april.checkpoint.journal import Journal
from april.checkpoint.store import CheckpointStore
from april.config.recipe import Recipe
from april.config.resolve import Resolved
from april.core.clock import Clock, WallClock
from april.core.errors import ModelError
from april.core.sampling import SamplingSpec
from april.distributed.remote_trainer import RemoteTrainer
from april.distributed.shared_weights import WeightBuffer
from april.engines.base import Engine
from april.models.policy import Policy
from april.rewards.base import Verifier
from april.rewards.build import build_reward
from april.rewards.runner import RewardRunner
from april.rollout.driver import Driver, Watcher
from april.rollout.pool import Pool
from april.rollout.temperature import TemperatureRule
from april.run.checks import Finding, check_data, check_disk, check_gold_answers, check_recipe, min_rewarded
from april.run.data import Data, load_data, verifier_of
from april.run.processes import any_child, engines_of, in_child, remote_engine, remote_trainer, share_weights, threads_of
from april.selection.sampler import PromptSampler
from april.text.tokenizer import Tokenizer
from april.training.single import Trainer

PACKAGED_POLICY = files("april") / "assets" / "policy"


@dataclass(slots=True)
class Parts:
    """Everything a run is made of, wired up and not yet started.

    Attributes:
        policy: as loaded; a trainer in another process has one of its own.
        buffer: weights in memory shared with other processes; None where there are none.
        findings: what the checks found, for the dry run.
    """

    recipe: Recipe
    resolved: Resolved
    folder: Path
    clock: Clock
    tokenizer: Tokenizer
    policy: Policy
    data: Data
    verifier: Verifier
    engine: Engine
    trainer: Trainer | RemoteTrainer
    prompts: PromptSampler
    pool: Pool
    driver: Driver
    store: CheckpointStore
    buffer: WeightBuffer | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.policy.module.parameters())

    def close(self) -> None:
        """End every process of the run."""
        self.driver.rewards.close()
        self.engine.close()
        if isinstance(self.trainer, RemoteTrainer):
            self.trainer.close()


def run_folder(recipe: Recipe) -> Path:
    """Where a run is kept."""
    return Path(recipe.out.format(name=recipe.name, seed=recipe.seed))


def model_path(name: str) -> str:
    """The folder or hub name of a policy."""
    return str(PACKAGED_POLICY) if name == "packaged" else name


def device_of(name: str) -> torch.device:
    """The torch device of a recipe.

    Raises:
        ModelError: a device that is not there, or that torch does not know.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    expected = f'"auto", "cpu" or "cuda"; this machine has {torch.cuda.device_count()} CUDA devices'
    hint = 'set model.device = "auto"; `april doctor` lists the devices'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError("an unknown device", where="model.device", got=name, expected=expected, hint=hint) from None
    if device.type == "cuda" and (device.index or 0) >= (torch.cuda.device_count() if cuda else 0):
        raise ModelError("there is no such CUDA device", where="model.device", got=name, expected=expected, hint=hint)
    return device


def load_policy(recipe: Recipe, path: str | None = None) -> tuple[Policy, Tokenizer]:
    """The policy of a recipe, or another one in its place, with its tokenizer."""
    name = model_path(path or recipe.model.path)
    device = device_of(recipe.model.device)
    _check_folder(name)
    torch.set_num_threads(threads_of(recipe) if recipe.model.threads or any_child(recipe) else torch.get_num_threads())
    tokenizer = Tokenizer.load(name)
    policy = Policy.load(
        name,
        dtype=torch.float64 if recipe.training.dtype == "float64" else torch.float32,
        device=device,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        autocast=recipe.training.autocast,
    )
    return policy, tokenizer


def _check_folder(name: str) -> None:
    """A name that can only mean a folder must be one: the hub is not asked for it."""
    path = Path(name)
    hub_name = len(path.parts) <= 2 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    if path.is_dir() or (hub_name and not (len(path.parts) == 2 and path.parent.is_dir())):
        return
    raise ModelError(
        "a model folder does not exist",
        where="model.path",
        got=name,
        expected='a Hugging Face folder, the name of a model on the hub, or "packaged"',
        hint="check the path; it is relative to the working directory",
    )


def context_tokens(policy: Policy) -> int:
    """The longest sequence the policy can read."""
    return int(getattr(policy.module.config.get_text_config(), "max_position_embeddings", 0)) or 1 << 20  # type: ignore[operator, union-attr]


def sampling_spec(recipe: Recipe, tokenizer: Tokenizer) -> SamplingSpec:
    """How training rollouts are drawn."""
    sampling = recipe.sampling
    return SamplingSpec(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=tokenizer.eos_ids,
        stop_strings=sampling.stop_strings,
        entropy=sampling.entropy,
        seed=recipe.seed,
    )


def build_engine(recipe: Recipe, policy: Policy, tokenizer: Tokenizer, clock: Clock) -> Engine:
    """The engine of a recipe, with a copy of the policy's weights."""
    make = registry.builder("engine", recipe.engine.type)
    return make(policy.module, tokenizer=tokenizer, clock=clock, config=_engine_config(recipe))  # type: ignore[no-any-return]


def _engine_config(recipe: Recipe) -> Any:
    """The engine's options, with what they take from the run where they leave it out."""
    noise = getattr(recipe.engine, "noise", None)
    if noise is None:
        return recipe.engine
    seed = recipe.seed if noise.seed is None else noise.seed
    own = noise.model_copy(update={"total_steps": noise.total_steps or recipe.steps, "seed": seed})
    return recipe.engine.model_copy(update={"noise": own})


def build_trainer(recipe: Recipe, policy: Policy, clock: Clock) -> Trainer:
    """The trainer of a recipe, with whatever further models its algorithm reads."""
    reference = load_policy(recipe, recipe.model.reference)[0] if "reference" in recipe.algorithm.requires else None
    return Trainer(policy, recipe.algorithm, recipe.training, reference=reference, clock=clock, total_steps=recipe.steps)


def build(
    resolved: Resolved,
    *,
    reward: Callable[..., Any] | None = None,
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Parts:
    """Check and wire up a run; nothing is generated, trained or written.

    Args:
        resolved: the recipe.
        reward: judges in place of the recipe's reward.
        watcher: told of every event.
        should_stop: asked between events.

    Raises:
        AprilError: for whatever the checks refuse.
    """
    recipe, clock, folder = resolved.recipe, WallClock(), run_folder(resolved.recipe)
    findings = check_recipe(recipe)
    policy, tokenizer = load_policy(recipe)
    data, verifier = _checked_data(recipe, policy, tokenizer, reward, findings)
    store = CheckpointStore(folder / "checkpoints", recipe.checkpoint.keep)
    buffer = share_weights(recipe, policy)
    engine, trainer = _engine_and_trainer(recipe, policy, tokenizer, clock, buffer, store)
    prompts, pool = PromptSampler(data.train, recipe.seed, recipe.batch.together), Pool()
    rewards = RewardRunner(verifier, tokenizer.decode, clock, recipe.scoring.timeout_s, recipe.scoring.workers)
    driver = Driver(
        clock=clock,
        engine=engine,
        rewards=rewards,
        prompts=prompts,
        spec=sampling_spec(recipe, tokenizer),
        pool=pool,
        sources=(trainer,),
        watcher=watcher,
        should_stop=should_stop,
        **driver_options(recipe),
    )
    parts = Parts(
        recipe,
        resolved,
        folder,
        clock,
        tokenizer,
        policy,
        data,
        verifier,
        engine,
        trainer,
        prompts,
        pool,
        driver,
        store,
        buffer,
        findings,
    )
    findings.append(check_disk(folder, parts.num_parameters, recipe.checkpoint.keep))
    return parts


def _engine_and_trainer(
    recipe: Recipe, policy: Policy, tokenizer: Tokenizer, clock: WallClock, buffer: WeightBuffer | None, store: CheckpointStore
) -> tuple[Engine, Trainer | RemoteTrainer]:
    """Each in the process that the recipe gives it."""

    def make(name: str) -> Engine:
        if buffer is not None and in_child(recipe, "engine"):
            return remote_engine(recipe, clock, buffer, name)
        return build_engine(recipe, policy, tokenizer, clock)

    engine = engines_of(recipe, make, clock)
    if buffer is not None and in_child(recipe, "trainer"):
        return engine, remote_trainer(recipe, clock, buffer, store.latest)
    return engine, build_trainer(recipe, policy, clock)


def _checked_data(
    recipe: Recipe, policy: Policy, tokenizer: Tokenizer, reward: Callable[..., Any] | None, findings: list[Finding]
) -> tuple[Data, Verifier]:
    """Prompts and what judges them, after the checks; adds what those found."""
    context = context_tokens(policy)
    data = load_data(recipe, tokenizer, context)
    verifier = build_reward(reward) if reward is not None else verifier_of(recipe, data.task)
    custom = reward is not None or getattr(recipe.reward, "type", None) == "python"
    findings += [*check_data(recipe, data, tokenizer, context), check_gold_answers(recipe, data, verifier, custom=custom)]
    return data, verifier


def driver_options(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says about when work runs and what counts."""
    return {
        "schedule": registry.builder("schedule", recipe.schedule.type)(recipe.schedule),
        "groups_per_step": recipe.batch.groups_per_step,
        "group_size": recipe.batch.group_size,
        "steps": recipe.steps,
        "group_filters": (partial(first_reason, recipe.algorithm.filter),),
        "min_rewarded": min_rewarded(recipe),
        "max_retries": recipe.limits.sample_losses,
        "limits": recipe.limits,
        "watches": [registry.builder("watch", watch.type)(watch) for watch in recipe.watch.values()],
        "temperatures": TemperatureRule(recipe.sampling.adaptive_temperature, recipe.sampling.adaptive_quantile),
    }


def open_journal(parts: Parts, name: str) -> Journal:
    """The journal that continues a checkpoint ("start" before the first one), listening to the pool from now on."""
    journal = Journal(parts.folder / "journal" / f"{name}.bin")
    parts.pool.listener = journal.append
    parts.driver.after_turn = journal.flush
    return journal
