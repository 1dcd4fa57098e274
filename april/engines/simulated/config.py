"""How replicas are used."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.engines.simulated.routing import Routing


class SimulatedConfig(Config):
    """How the replicas are used; what they cost is in `EngineCosts`."""

    routing: Routing = Field(
        "least_loaded",
        description="least_loaded: each sample to the replica with the fewest; by_group: a group's samples together; static: by "
        "the number of the group; queue: samples wait centrally for a free place",
    )
    drain: Literal["together", "each"] = Field(
        "together",
        description="new weights after running samples: when all replicas are quiet (together), or each by itself",
    )
    shares_prefix: bool = Field(True, description="samples of a group in one replica share the KV of their prompt")
    max_sample_tokens: int = Field(1 << 30, ge=2, description="longest prompt plus response; never more than the KV memory")
    report_every_s: float = Field(
        0.0, ge=0, description="the engine reports at multiples of this; 0: at each event, and only then"
    )
    report_every_tokens: int = Field(256, ge=1, description="tokens that a failing replica loses at most, for each sample")
    failures_per_hour: float = Field(0.0, ge=0, description="of each replica, while it works")
    restart_s: float = Field(120.0, ge=0, description="a replica that failed is back after this")
