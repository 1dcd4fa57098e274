"""From hardware and model to the seconds of decoding, prefill, updates and weight syncs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from april.config.schema import Config
from april.core.errors import DataError, RecipeError
from april.engines.simulated.costs import EngineCosts
from april.simulate.hardware import GB, TB, TFLOP, WEIGHT_BYTES, Precision, device, model

ALLREDUCE_GB_S = {2: 289.0, 4: 220.0, 8: 189.0}
"""Measured by message size over time, 128 MiB on NVLink H200 (tables published with APEX); other widths take the nearest."""
ALLREDUCE_LATENCY_S = 12e-6


class Efficiency(Config):
    """How far a serving stack stays behind the roofline."""

    step_fixed_s: float = Field(0.008, ge=0, description="launches, scheduling and sampling of a decode step")
    step_per_sequence_s: float = Field(1e-5, ge=0, description="the part of it that grows with the sequences")
    memory: float = Field(0.7, gt=0, le=1, description="share of the peak bandwidth")
    compute: float = Field(0.6, gt=0, le=1, description="share of the peak arithmetic")
    max_running: int = Field(256, ge=1, description="sequences that a replica decodes at once")


EFFICIENCIES = {
    "tuned": Efficiency(step_fixed_s=0.004, memory=0.8),
    "typical": Efficiency(),
    "legacy": Efficiency(step_fixed_s=0.025, memory=0.35),
}


class Cluster(Config):
    """Devices, the policy on them, and who uses which device.

    "colocated": all devices generate and train in turn. "split": `train_devices` of them train, the others generate, at
    the same time where the schedule lets them.
    """

    device: str = Field("H100", description="name in the table of devices")
    num_devices: int = Field(8, ge=1, description="in all")
    model: str = Field("Qwen3-4B", description="name in the table of models")
    tp: int = Field(1, ge=1, description="devices of one replica")
    placement: Literal["colocated", "split"] = Field("colocated", description="who uses which device")
    train_devices: int | None = Field(None, ge=1, description="split: devices that train; half of them when left out")
    efficiency: Literal["tuned", "typical", "legacy"] | Efficiency = Field("typical", description="of the serving stack")
    precision: Precision = Field("bf16", description="of the weights while generating")
    kv_bytes_fraction: float = Field(1.0, gt=0, le=1, description="bytes of the KV relative to bf16")
    memory_fraction: float = Field(0.85, gt=0, le=1, description="of the devices, for weights and KV while generating")
    mfu: float | None = Field(
        None, gt=0, le=1, description="of training; 0.35 from 7 B active parameters, 0.18 to 2 B, else between"
    )
    passes: float = Field(6.0, gt=0, description="arithmetic of training, per parameter and token: 6, or 8 with recomputation")
    extra_forwards: float = Field(0.0, ge=0, description="further forward passes over the batch: proximal, reference log-probs")
    train_fixed_s: float = Field(2.0, ge=0, description="each update, whatever its tokens")
    sync_fixed_s: float = Field(1.0, ge=0, description="each change of weights")
    sync_gb_s: float = Field(20.0, gt=0, description="weights from the trainer to a replica")
    switch_fixed_s: float = Field(3.0, ge=0, description="colocated: from generating to training and back, together")
    switch_gb_s: float = Field(
        30.0, gt=0, description="colocated: weights and optimiser leave and return at this rate, per device"
    )

    @model_validator(mode="after")
    def _fits(self) -> Cluster:
        if self.train_devices is not None and self.placement != "split":
            raise ValueError("train_devices has an effect only with placement = 'split'")
        if self.rollout_devices < self.tp:
            raise ValueError(f"{self.rollout_devices} devices that generate hold no replica of tp = {self.tp}")
        return self

    @property
    def training_devices(self) -> int:
        """Devices that an update runs on."""
        if self.placement == "colocated":
            return self.num_devices
        return self.train_devices if self.train_devices is not None else max(1, self.num_devices // 2)

    @property
    def rollout_devices(self) -> int:
        """Devices that generate."""
        return self.num_devices if self.placement == "colocated" else self.num_devices - self.training_devices

    @property
    def num_replicas(self) -> int:
        """Engine processes."""
        return self.rollout_devices // self.tp


class TrainCosts(Config):
    """The constants of an update and of what surrounds it."""

    fixed_s: float = Field(0.0, ge=0, description="each update")
    per_token_s: float = Field(0.0, ge=0, description="each token of prompt and response, on all training devices together")
    switch_s: float = Field(0.0, ge=0, description="colocated: from generating to training and back, together")

    def update_s(self, num_tokens: int) -> float:
        """Seconds of one update over so many tokens."""
        return self.fixed_s + self.per_token_s * num_tokens


class FitError(Config):
    """How far a fit is from what was measured."""

    points: int = Field(ge=0, description="measured points")
    median_fraction: float = Field(ge=0, description="median over them of |fitted / measured - 1|")
    max_fraction: float = Field(ge=0, description="the largest of these")


class Calibration(Config):
    """Where measured constants come from."""

    decode: FitError = Field(description="of decode steps")
    prefill: FitError = Field(description="of prefills")
    updates: FitError = Field(description="of updates")


class Costs(Config):
    """Everything that takes time, as numbers: computed from a cluster, or measured by `april calibrate` and frozen in a file."""

    engine: EngineCosts = Field(default=EngineCosts())
    train: TrainCosts = Field(default=TrainCosts())
    num_replicas: int = Field(1, ge=1, description="engine processes")
    placement: Literal["colocated", "split"] = Field("colocated", description="whether devices generate and train in turn")
    train_share: float = Field(0.5, gt=0, lt=1, description="split: share of the devices that train, for the idle share")
    source: str = Field("given", description="where the numbers come from")
    calibration: Calibration | None = Field(None, description="measured ones: how well they fit what was measured")

    def save(self, path: Path) -> None:
        """Write the constants as JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Read constants that `save` wrote.

        Raises:
            DataError: no such file, or not a file of constants.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            raise DataError(
                "costs cannot be read", where=str(path), got=error, expected="a file that `Costs.save` or `april calibrate` wrote"
            ) from None


def cluster_costs(cluster: Cluster) -> Costs:
    """All constants of a cluster.

    Raises:
        RecipeError: unknown device or model, or weights that leave no room for KV.
    """
    return Costs(
        engine=engine_costs(cluster),
        train=train_costs(cluster),
        num_replicas=cluster.num_replicas,
        placement=cluster.placement,
        train_share=cluster.training_devices / cluster.num_devices if cluster.placement == "split" else 0.5,
        source=f"{cluster.num_devices} x {cluster.device}, {cluster.model}, {cluster.placement}",
    )


def engine_costs(cluster: Cluster) -> EngineCosts:
    """One replica: a roofline with overheads (notes 2.7), prefill of 2 P n + 2 layers width n^2 operations."""
    gpu, policy, tp = device(cluster.device), model(cluster.model), cluster.tp
    stack = cluster.efficiency if isinstance(cluster.efficiency, Efficiency) else EFFICIENCIES[cluster.efficiency]
    weight_bytes = WEIGHT_BYTES[cluster.precision]
    bandwidth, arithmetic = tp * gpu.bandwidth_tb_s * TB * stack.memory, tp * gpu.bf16_tflops * TFLOP * stack.compute
    kv_bytes = policy.kv_bytes_per_token * cluster.kv_bytes_fraction
    room = cluster.memory_fraction * gpu.memory_gb * GB * tp - weight_bytes * policy.parameters
    if room < kv_bytes * 1024:
        raise RecipeError(
            "the weights leave no room for KV",
            where="cluster.tp",
            got=f"{weight_bytes * policy.parameters / GB:.0f} GB of weights on {tp} x {gpu.memory_gb:.0f} GB",
            expected="room for at least 1024 tokens",
            hint="raise cluster.tp, or cluster.memory_fraction",
        )
    fixed_s, per_sequence_s = _tensor_parallel_s(tp, policy.layers, policy.width)
    return EngineCosts(
        step_fixed_s=stack.step_fixed_s + fixed_s,
        step_per_sequence_s=stack.step_per_sequence_s + per_sequence_s,
        weights_read_s=weight_bytes * (policy.parameters - policy.expert_parameters) / bandwidth,
        experts_read_s=weight_bytes * policy.expert_parameters / bandwidth,
        experts_share=policy.experts_per_token / policy.experts,
        context_token_read_s=kv_bytes / bandwidth,
        compute_per_sequence_s=2 * policy.active_parameters / arithmetic,
        prefill_per_token_s=2 * policy.active_parameters / arithmetic,
        prefill_per_token2_s=2 * policy.layers * policy.width / arithmetic,
        kv_tokens=int(room / kv_bytes),
        max_running=stack.max_running,
        sync_s=cluster.sync_fixed_s + weight_bytes * policy.parameters / (cluster.sync_gb_s * GB),
    )


def _tensor_parallel_s(tp: int, layers: int, width: int) -> tuple[float, float]:
    """Two all-reduces a layer: seconds a step, and seconds a step and sequence."""
    if tp == 1:
        return 0.0, 0.0
    rate = ALLREDUCE_GB_S[min(ALLREDUCE_GB_S, key=lambda known: abs(math.log(known / tp)))] * GB
    return 2 * layers * ALLREDUCE_LATENCY_S, 2 * layers * 2 * width / rate


def train_costs(cluster: Cluster) -> TrainCosts:
    """An update: `passes` P operations a token, 2 P for each further forward pass; and the colocated switch."""
    gpu, policy, num = device(cluster.device), model(cluster.model), cluster.training_devices
    operations = (cluster.passes + 2 * cluster.extra_forwards) * policy.active_parameters
    rate = num * gpu.bf16_tflops * TFLOP * (cluster.mfu or default_mfu(policy.active_parameters))
    switch_s = cluster.switch_fixed_s + 2 * 2 * policy.parameters / cluster.tp / (cluster.switch_gb_s * GB)
    return TrainCosts(
        fixed_s=cluster.train_fixed_s,
        per_token_s=operations / rate,
        switch_s=switch_s if cluster.placement == "colocated" else 0.0,
    )


def default_mfu(active_parameters: float) -> float:
    """Share of the peak that training reaches: 0.18 up to 2 B parameters, 0.35 from 7 B, by the logarithm in between."""
    place = math.log(active_parameters / 2e9) / math.log(7 / 2)
    return 0.18 + (0.35 - 0.18) * min(1.0, max(0.0, place))
