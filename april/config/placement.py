"""Where the parts of a run are placed with `backend = "ray"`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from april.config.schema import Config

Strategy = Literal["pack", "spread", "strict_pack", "strict_spread"]


class RoleConfig(Config):
    """What each process of one role gets, and how the processes lie on the nodes."""

    cpus: float = Field(1.0, gt=0, description="CPUs that Ray counts for each process; threads are `threads` of the part")
    gpus: float = Field(0.0, ge=0, description="GPUs of each process; above 1 whole ones")
    strategy: Strategy = Field(
        "pack",
        description="pack: on few nodes; spread: over many; strict_pack: all on one node, or an error; strict_spread: each on a "
        "node of its own, or an error",
    )
    resources: dict[str, float] = Field({}, description="custom resources of Ray that a node must have for each process")

    @model_validator(mode="after")
    def _whole_gpus(self) -> RoleConfig:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError("more than one GPU are whole ones: give a whole number, or a part of one")
        return self

    @property
    def bundle(self) -> dict[str, float]:
        """What one process takes, in Ray's words."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {}), **self.resources}


class PlacementConfig(Config):
    """Nodes and devices of trainer ranks, engines and reward workers; read where `backend` is "ray"."""

    address: str | None = Field(
        None,
        description='of a running Ray cluster ("auto" finds that of this machine); unset: RAY_ADDRESS, else one is started here',
    )
    devices: Literal["split", "shared"] = Field(
        "split",
        description="split: every process has its own; shared: trainer rank i and engine i have the same, and the engines sleep "
        "while the trainer computes, where they can",
    )
    timeout_s: float = Field(
        60.0, gt=0, description="how long to wait for nodes with room; raise it where nodes are started on demand"
    )
    object_store_mb: int | None = Field(
        None,
        ge=80,
        description="Ray's shared memory of a cluster that is started here; unset: six times the weights, 256 at least",
    )
    trainer: RoleConfig = Field(default=RoleConfig(), description="each rank of the trainer")
    engine: RoleConfig = Field(default=RoleConfig(), description="each engine")
    reward: RoleConfig = Field(default=RoleConfig(), description="each of scoring.workers")

    @model_validator(mode="after")
    def _shared_devices_are_equal(self) -> PlacementConfig:
        if self.devices == "shared" and (self.trainer.gpus != self.engine.gpus or self.trainer.gpus > 1):
            raise ValueError('devices = "shared" needs trainer.gpus and engine.gpus to be equal, 0 or 1')
        return self
