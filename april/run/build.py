"""From a recipe to running parts, wired up; `april.run.processes` makes those that have processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, cast

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
from april.distributed.ray_cluster import RayCluster
from april.distributed.remote_trainer import RemoteTrainer
from april.distributed.transport import WeightTransport
from april.engines.adapters import AdapterEngine
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
from april.run.folders import run_folder
from april.run.processes import (
    any_child,
    cluster_of,
    engines_of,
    in_child,
    published,
    remote_engine,
    remote_trainer,
    share_weights,
    start_worker_of,
    threads_of,
)
from april.selection.sampler import PromptSampler
from april.text.tokenizer import Tokenizer
from april.training.single import Trainer

PACKAGED_POLICY = files("april") / "assets" / "policy"


@dataclass(slots=True)
class Parts:
    """Everything a run is made of, wired up and not yet started.

    Attributes:
        policy: as loaded; a trainer in another process has one of its own.
        transport: carries weights to other processes; None where there are none.
        findings: what the checks found, for the dry run.
        cluster: the places of the run on a Ray cluster; None without one.
        ends: closes all that has a process, files or places, the newest first.
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
    transport: WeightTransport | None = None
    findings: list[Finding] = field(default_factory=list)
    cluster: RayCluster | None = None
    ends: ExitStack = field(default_factory=ExitStack)

    @property
    def num_parameters(self) -> int:
        """Numbers of the policy."""
        return num_parameters(self.policy)

    @property
    def num_trained(self) -> int:
        """Numbers that are trained."""
        return num_trained(self.recipe, self.policy)

    def close(self) -> None:
        """End every process of the run, also where the end of one fails; a second call does nothing."""
        self.ends.close()


def num_parameters(policy: Policy) -> int:
    """Numbers of a policy."""
    return sum(parameter.numel() for parameter in policy.module.parameters())


def num_trained(recipe: Recipe, policy: Policy) -> int:
    """Numbers of a policy that are trained, and so are in each checkpoint."""
    if recipe.training.lora is None:
        return num_parameters(policy)
    return sum(tensor.numel() for tensor in published(recipe, policy).values() if tensor.ndim)


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
    """The engine of a recipe, with a copy of the policy's weights; adapters that are trained are merged with them."""
    make = registry.builder("engine", recipe.engine.type)
    engine: Engine = make(policy.module, tokenizer=tokenizer, clock=clock, config=_engine_config(recipe))
    return engine if recipe.training.lora is None else cast(Engine, AdapterEngine(engine, policy))


def _engine_config(recipe: Recipe) -> Any:
    """The engine's options, with what they take from the run where they leave it out."""
    noise = getattr(recipe.engine, "noise", None)
    if noise is None:
        return recipe.engine
    seed = recipe.seed if noise.seed is None else noise.seed
    own = noise.model_copy(update={"total_steps": noise.total_steps or recipe.steps, "seed": seed})
    return recipe.engine.model_copy(update={"noise": own})


def needs_reference(recipe: Recipe) -> bool:
    """Whether a reference policy is loaded; the trainer has one itself where only adapters are trained."""
    own = recipe.training.lora is not None and recipe.model.reference is None
    return "reference" in recipe.algorithm.requires and not own


def build_trainer(recipe: Recipe, policy: Policy, clock: Clock) -> Trainer:
    """The trainer of a recipe, with whatever further models its algorithm reads."""
    reference = load_policy(recipe, recipe.model.reference)[0] if needs_reference(recipe) else None
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
    findings.append(check_disk(folder, num_trained(recipe, policy), recipe.checkpoint.keep))
    store = CheckpointStore(folder / "checkpoints", recipe.checkpoint.keep)
    with ExitStack() as ends:
        cluster, transport, engine, trainer = _started(recipe, policy, tokenizer, clock, store, folder, ends)
        prompts, pool = PromptSampler(data.train, recipe.seed, recipe.batch.together), Pool()
        driver = Driver(
            clock=clock,
            engine=engine,
            rewards=_rewards(recipe, verifier, tokenizer, clock, cluster, ends),
            prompts=prompts,
            spec=sampling_spec(recipe, tokenizer),
            pool=pool,
            sources=(trainer,),
            watcher=watcher,
            should_stop=should_stop,
            **driver_options(recipe),
        )
        return Parts(
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
            transport,
            findings,
            cluster,
            ends.pop_all(),
        )


def _rewards(
    recipe: Recipe, verifier: Verifier, tokenizer: Tokenizer, clock: Clock, cluster: RayCluster | None, ends: ExitStack
) -> RewardRunner:
    """What judges, closed by `ends`."""
    timeout_s, workers, start = recipe.scoring.timeout_s, recipe.scoring.workers, start_worker_of(recipe, cluster)
    rewards = RewardRunner(verifier, tokenizer.decode, clock, timeout_s, workers, start_worker=start, limits=recipe.limits)
    ends.callback(rewards.close)
    return rewards


def _started(
    recipe: Recipe,
    policy: Policy,
    tokenizer: Tokenizer,
    clock: WallClock,
    store: CheckpointStore,
    folder: Path,
    ends: ExitStack,
) -> tuple[RayCluster | None, WeightTransport | None, Engine, Trainer | RemoteTrainer]:
    """The parts that compute, and what places and connects them where they are not in this process; `ends` closes each."""
    cluster = cluster_of(recipe, policy)
    if cluster is not None:
        ends.callback(cluster.close)
    transport = share_weights(recipe, policy, folder, cluster)
    if transport is not None:
        ends.callback(transport.close)
    engine = _engine(recipe, policy, tokenizer, clock, transport, cluster)
    ends.callback(engine.close)
    if transport is None or not in_child(recipe, "trainer"):
        return cluster, transport, engine, build_trainer(recipe, policy, clock)
    trainer = remote_trainer(recipe, clock, transport, store.latest, cluster)
    ends.callback(trainer.close)
    return cluster, transport, engine, trainer


def _engine(
    recipe: Recipe,
    policy: Policy,
    tokenizer: Tokenizer,
    clock: WallClock,
    transport: WeightTransport | None,
    cluster: RayCluster | None,
) -> Engine:
    """In the process that the recipe gives it."""
    numbers = count()

    def make(name: str) -> Engine:
        if transport is not None and in_child(recipe, "engine"):
            spawn = None if cluster is None else cluster.spawn("engine", next(numbers))
            return remote_engine(recipe, clock, transport, name, spawn)
        return build_engine(recipe, policy, tokenizer, clock)

    return engines_of(recipe, make, clock)


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
        "greedy_members": recipe.batch.greedy_members,
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
