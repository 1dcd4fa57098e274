"""Options of the trainer and of the warm start. No torch."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from april.config.schema import Config
from april.models.lora_config import LoraConfig

Schedule = Literal["constant", "linear", "cosine"]


class AdamConfig(Config):
    """AdamW (Loshchilov and Hutter 2019)."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the first and second moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; norms and biases have none")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")


class OptimizerConfig(AdamConfig):
    """AdamW and its learning rate over time."""

    schedule: Schedule = Field("constant", description="what follows the warm-up: constant, or a linear or cosine fall")
    warmup_steps: int = Field(0, ge=0, description="updates over which the rate rises linearly")
    min_lr_fraction: float = Field(0.0, ge=0, le=1, description="fraction of the peak that a falling schedule ends with")


class ValueConfig(AdamConfig):
    """The value model: a copy of the policy with one number in place of the vocabulary. Made where an atom reads "value"."""

    lr: float = Field(1e-5, gt=0, description="learning rate, constant; some ten times that of the policy")
    warmup_steps: int = Field(
        0, ge=0, description="first batches, on which only the value model is trained, on Monte-Carlo returns"
    )
    num_epochs: int = Field(1, ge=1, description="passes of the value model over each batch")


class ShardingConfig(Config):
    """How weights, gradients and optimiser are cut over the ranks (FSDP2); read where `training.ranks` is above 1."""

    param_dtype: Literal["same", "float32", "bfloat16"] = Field(
        "same", description="what whole layers are gathered and computed in; same: as they are kept"
    )
    reduce_dtype: Literal["same", "float32", "bfloat16"] = Field(
        "same", description="what gradients are summed over ranks in; same: that of the computation"
    )
    cpu_offload: bool = Field(False, description="keep shards, gradients and optimiser in CPU memory; layers visit the device")
    reshard_after_forward: bool = Field(
        True, description="give a layer's gathered weights back after its forward, and gather them again in the backward pass"
    )
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: nccl where there are CUDA devices, else gloo")


class TrainerConfig(OptimizerConfig):
    """How one batch of groups becomes one update."""

    process: Literal["main", "child"] = Field(
        "main", description="where the trainer computes; a child process trains while rollouts go on, if the schedule lets them"
    )
    ranks: int = Field(
        1, ge=1, description="processes that share weights and work of the trainer; above 1 all of them are child processes"
    )
    sharding: ShardingConfig = Field(default=ShardingConfig(), description="how ranks share them; refused on one rank")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a child process; unset takes model.threads, and for 0 its share of the cores"
    )
    micro_batch_tokens: int = Field(16384, ge=1, description="prompt and response tokens that go through the model at once")
    num_optimizer_steps: int = Field(
        1, ge=1, description="mini-batches, each with its own optimiser step, that a batch is cut into"
    )
    num_epochs: int = Field(1, ge=1, description="passes over each batch")
    proximal: Literal["recompute", "interpolate"] = Field(
        "recompute",
        description="where the policy before the update comes from: a forward pass (none with one optimiser step a batch), or "
        "interpolate between behaviour and current by age (AReaL)",
    )
    gradient_checkpointing: bool = Field(False, description="recompute layers in the backward pass to save memory")
    dtype: Literal["auto", "float32", "float64"] = Field("auto", description="of the weights; auto is float32")
    autocast: bool = Field(True, description="run forwards in bfloat16 where there is a CUDA device")
    replay_routes: bool = Field(
        False, description="mixtures of experts: train with the experts that the engine used (R3); needs engine.record_routes"
    )
    entropy: bool = Field(False, description="measure exact entropies of the policy being trained; costs one more softmax")
    skip_zero_advantage: bool = Field(
        True,
        description="leave out samples that get no gradient, such as those of constant groups; the metrics are of the others",
    )
    nonfinite: Literal["raise", "skip"] = Field("raise", description="what a loss or gradient that is not finite does")
    value: ValueConfig = Field(default=ValueConfig(), description="the value model, for algorithms that have one")
    lora: LoraConfig | None = Field(None, description="train low-rank adapters only; unset: all weights")

    @field_validator("lora", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        """false takes the section of a recipe away, true is all of its defaults."""
        return (LoraConfig() if value else None) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _shards_are_of_ranks(self) -> TrainerConfig:
        if self.ranks == 1 and self.sharding != ShardingConfig():
            raise ValueError("training.sharding has no effect on one rank: set training.ranks above 1, too")
        return self


class SupervisedConfig(OptimizerConfig):
    """Warm start: next-token training on worked completions."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the first and second moments")
    schedule: Schedule = Field("cosine", description="what follows the warm-up: constant, or a linear or cosine fall")
    num_steps: int = Field(ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=1, description="completions in each step")
    micro_batch_tokens: int = Field(16384, ge=1, description="prompt and completion tokens that go through the model at once")
    muon_lr: float = Field(0.0, ge=0, description="learning rate of Muon on the hidden matrices; 0 leaves them to AdamW, too")
    seed: int = Field(0, description="order of the examples")


def learning_rate(config: OptimizerConfig, step: int, total_steps: int | None) -> float:
    """The learning rate of update `step`, from 0.

    lr * min(1, (step + 1) / warmup) during the warm-up; then, with x in [0, 1) the part of the remaining updates that is done,
    lr * (m + (1 - m) * f(x)) with f = 1 - x (linear) or (1 + cos(pi x)) / 2,
    and m the fraction that is left at the end.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant" or total_steps is None:
        return config.lr
    x = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    falling = 1 - x if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * x))
    return config.lr * (config.min_lr_fraction + (1 - config.min_lr_fraction) * falling)
