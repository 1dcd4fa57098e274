"""The typed recipe of a warm start: a small policy by supervised training, from scratch or from a model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from april import registry
from april.config.recipe import PromptConfig
from april.config.schema import Config


def _training(value: Any) -> Any:
    return registry.validate(registry.load("april.training.config:SupervisedConfig"), value, "stages.training")


class Vocabulary(Config):
    """A tokenizer made on the spot: a fixed list of words."""

    words: tuple[str, ...] = Field(description="every token besides <pad>, <eos> and <unk>")
    pattern: str = Field(description="regular expression that cuts a text into words")


class Completion(Config):
    """One way of answering, and how often it is shown."""

    weight: float = Field(1.0, gt=0, description="share of the examples, relative to the other ways")
    template: str | None = Field(None, description="str.format with the item's fields")
    function: str | None = Field(None, description='"module:function" that makes a completion from an item')

    @model_validator(mode="after")
    def _one_source(self) -> Completion:
        if (self.template is None) == (self.function is None):
            raise ValueError("give either `template` or `function`")
        return self


class Stage(Config):
    """One stretch of training on one mixture of answers."""

    name: str = Field(description="shown while it runs")
    task: Annotated[SerializeAsAny[Config], BeforeValidator(lambda value: registry.parse("task", value, "stages.task"))]
    completions: tuple[Completion, ...] = Field(min_length=1, description="ways of answering")
    training: Annotated[SerializeAsAny[Config], BeforeValidator(_training)]


class WarmStartRecipe(Config):
    """A policy from worked solutions."""

    name: str = Field("warm-start", description="shown while it runs")
    seed: int = Field(0, ge=0, description="of the weights, and of which item is answered in which way")
    model: str | dict[str, Any] = Field(description="a model folder or hub name, or a Hugging Face config for random weights")
    tokenizer: str | Vocabulary | None = Field(
        None, description="a folder, or a vocabulary to make one of; the model's own where left out"
    )
    prompt: PromptConfig = Field(default=PromptConfig())
    excludes: str | None = Field(None, description="recipe whose held-out problems are never shown")
    threads: int = Field(1, ge=0, description="CPU threads of torch; 0 takes one for each core")
    stages: tuple[Stage, ...] = Field(min_length=1, description="one after the other")
