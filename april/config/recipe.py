"""The typed recipe of a run: one field per concern, components typed through the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from april import registry
from april.config.limits import LimitsConfig
from april.config.placement import PlacementConfig
from april.config.publishing import PublishingConfig
from april.config.schema import Config


def _component(kind: str) -> Any:
    """A field filled by any registered component of a kind."""
    return Annotated[SerializeAsAny[Config], BeforeValidator(lambda value: registry.parse(kind, value, kind))]


def _components(kind: str) -> Any:
    """A table filled by any number of registered components of a kind: name = { fields }; `name = false` takes one away."""

    def parsed(value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        tables = {name: {} if part is True else part for name, part in value.items() if part is not False}
        return {
            name: registry.parse(kind, {"type": name, **part} if isinstance(part, Mapping) else part, f"{kind}.{name}")
            for name, part in tables.items()
        }

    return Annotated[dict[str, SerializeAsAny[Config]], BeforeValidator(parsed)]


def _section(target: str, where: str) -> Any:
    """A field whose typed config lives in a higher layer, imported when a recipe is read."""
    return Annotated[
        SerializeAsAny[Config], BeforeValidator(lambda value: registry.validate(registry.load(target), value, where))
    ]


class ModelConfig(Config):
    """The policy."""

    path: str = Field("packaged", description='Hugging Face folder or hub name; "packaged" is the small policy that April brings')
    reference: str | None = Field(
        None, description="frozen policy for penalties: a path as above; only loaded where one needs it"
    )
    device: str = Field("auto", description='"cpu", "cuda", or "auto": CUDA where there is one')
    threads: int = Field(
        1, ge=0, description="CPU threads of torch; 0 takes one for each core (worth it from some 20 M parameters)"
    )


class PromptConfig(Config):
    """How an item becomes a prompt."""

    template: str = Field("{question}", description="str.format with the item's fields")
    chat: bool = Field(False, description="wrap it as a user message with the tokenizer's chat template")
    max_tokens: int = Field(1024, ge=1, description="longest prompt; a longer one is an error")


class SamplingConfig(Config):
    """How responses are drawn; frozen per sample at first issue."""

    max_new_tokens: int = Field(512, ge=1, description="response tokens in total, over all segments of a sample")
    temperature: float = Field(1.0, gt=0, description="divides the logits")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; training needs 1")
    top_k: int = Field(0, ge=0, description="0 keeps all; training needs 0")
    stop_strings: tuple[str, ...] = Field((), description="end a response with the token that completes one of these")
    entropy: bool = Field(False, description="record the exact entropy of every sampling distribution")
    adaptive_temperature: float = Field(
        0.0, ge=0, lt=1, description="how far each token's temperature follows its entropy: 0.05 is 5 % up or down (HAPO); 0: not"
    )
    adaptive_quantile: float = Field(
        0.8, gt=0, lt=1, description="quantile of the last batch's entropies at which the temperature stays as it is"
    )

    @model_validator(mode="after")
    def _adapts_to_what_is_known(self) -> SamplingConfig:
        if self.adaptive_temperature and not self.entropy:
            raise ValueError("sampling.adaptive_temperature follows entropies: set sampling.entropy = true, too")
        return self


class ScoringConfig(Config):
    """How rewards are computed."""

    timeout_s: float = Field(5.0, gt=0, description="a judgement that takes longer costs its sample")
    workers: int = Field(0, ge=0, description="processes that judge; 0: in the main process, in order")


class BatchConfig(Config):
    """The shape of one update."""

    groups_per_step: int = Field(16, ge=1, description="prompts per update (N)")
    group_size: int = Field(8, ge=1, description="samples per prompt (G)")
    greedy_members: int = Field(
        0, ge=0, description="greedy samples beside these, whose mean reward is the column baseline; they do not train"
    )
    together: str | None = Field(
        None, description="number of the item that prompts of one question share; these are then handed out one after another"
    )


class EvaluationConfig(Config):
    """Held-out accuracy, before, after and in between."""

    num_problems: int = Field(512, ge=1, description="held-out problems; training never sees them")
    every_steps: int = Field(0, ge=0, description="evaluate during training every so many steps; 0: only before and after")
    modes: tuple[Literal["greedy", "sampled"], ...] = Field(
        ("greedy", "sampled"), description="greedy, and sampled at temperature 1"
    )
    num_samples: int = Field(1, ge=1, description="samples per problem in the sampled mode; pass@k for every k up to it")
    seed: int = Field(0, ge=0, description="of the choice of problems and of the sampled mode")


class CheckpointConfig(Config):
    """What survives."""

    every_steps: int = Field(10, ge=0, description="a checkpoint every so many updates; 0: only at the end and when interrupted")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints stay")
    journal: bool = Field(True, description="write every transition between checkpoints, so that no rollout is lost in a crash")
    fsync: bool = Field(True, description="force the journal to the disk at each step, so that it survives a power cut too")
    continue_from: Literal["auto", "tokens", "step"] = Field(
        "auto",
        description="after a crash: tokens keeps the unfinished samples as far as they were written; step generates the "
        "interrupted step again from its start, which repeats the uninterrupted run bit for bit; auto is step for "
        "synchronous schedules, else tokens",
    )


class ObserveConfig(Config):
    """What is recorded."""

    transcripts_every_steps: int = Field(5, ge=0, description="record some groups as text every so many steps; 0: never")
    transcript_groups: int = Field(2, ge=1, description="groups recorded each time")
    timeline: bool = Field(True, description="who ran and who waited, for the report and for Perfetto")
    tensorboard: bool = Field(False, description="also write TensorBoard files (extra april-rl[tensorboard])")


class Recipe(Config):
    """A complete run."""

    name: str = Field("run", description="shown in the report")
    seed: int = Field(0, ge=0, description="root of every random stream")
    steps: int = Field(100, ge=1, description="updates in all")
    out: str = Field("runs/{name}", description="the run's folder; {name} and {seed} are filled in")
    model: ModelConfig = Field(default=ModelConfig())
    task: _component("task")  # type: ignore[valid-type]
    evaluation_task: _component("task") | None = Field(None, description="held-out problems from here; else split off the task")  # type: ignore[valid-type]
    prompt: PromptConfig = Field(default=PromptConfig())
    reward: _component("reward") | None = Field(None, description="judges a finished sample; the task's own where left out")  # type: ignore[valid-type]
    scoring: ScoringConfig = Field(default=ScoringConfig())
    sampling: SamplingConfig = Field(default=SamplingConfig())
    batch: BatchConfig = Field(default=BatchConfig())
    schedule: _component("schedule") = Field(description="when work runs and when a batch is cut")  # type: ignore[valid-type]
    watch: _components("watch") = Field({}, description="budgets and early ends of samples, by name")  # type: ignore[valid-type]
    engine: _component("engine") = Field(description="where tokens come from")  # type: ignore[valid-type]
    algorithm: _section("april.algorithms.spec:AlgorithmConfig", "algorithm") = Field(default_factory=dict, validate_default=True)  # type: ignore[valid-type]
    training: _section("april.training.config:TrainerConfig", "training") = Field(default_factory=dict, validate_default=True)  # type: ignore[valid-type]
    evaluation: EvaluationConfig = Field(default=EvaluationConfig())
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig())
    observe: ObserveConfig = Field(default=ObserveConfig())
    limits: LimitsConfig = Field(default=LimitsConfig())
    publishing: PublishingConfig = Field(
        default=PublishingConfig(), description="how new weights get from the trainer to engines in other processes"
    )
    backend: Literal["local", "ray"] = Field(
        "local",
        description="what starts the processes of a run: local, this machine; ray, a Ray cluster, where each trainer rank, "
        "each engine and each reward worker is an actor",
    )
    placement: PlacementConfig = Field(default=PlacementConfig(), description="where actors are placed; only with backend = ray")
