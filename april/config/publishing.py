"""How new weights get from the trainer to the engines, where they compute in different processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from april.config.schema import Config

_OWN = {"disk": ("folder", "fsync", "bucket_mib"), "broadcast": ("device", "deadline_s", "bucket_mib")}


class PublishingConfig(Config):
    """The transport of weights; an option of another transport than the chosen one is an error."""

    transport: Literal["shared_memory", "disk", "broadcast"] = Field(
        "shared_memory",
        description="shared_memory: written once and read in place, on one machine; disk: files of the tensors that changed; "
        "broadcast: sent to all engines at once over torch.distributed",
    )
    folder: str | None = Field(
        None, description="disk: holds the files; may lie on a shared file system; {name} and {seed} are filled in; "
        "unset: weights, in the run's folder"
    )  # fmt: skip
    fsync: bool = Field(False, description="disk: force each version to the disk before it counts as written")
    device: Literal["cpu", "cuda"] = Field(
        "cpu",
        description="broadcast: memory that is sent from and received in: cpu over gloo; cuda over NCCL, where each "
        "process that takes part needs a GPU of its own",
    )
    deadline_s: float = Field(
        30.0, gt=0, description="broadcast: an engine that does not take its part for this long is left out, and catches up later"
    )
    bucket_mib: int = Field(64, ge=1, description="disk: largest file; broadcast: bytes that are sent at once")

    @model_validator(mode="after")
    def _options_are_of_the_transport(self) -> PublishingConfig:
        own = _OWN.get(self.transport, ())
        default = type(self).model_fields
        idle = [
            name
            for name in sorted({name for names in _OWN.values() for name in names})
            if name not in own and getattr(self, name) != default[name].default
        ]
        if idle:
            users = [transport for transport, names in _OWN.items() if idle[0] in names]
            raise ValueError(
                f'publishing.{idle[0]} has no effect with transport = "{self.transport}"; it is for {" and ".join(users)}'
            )
        return self
