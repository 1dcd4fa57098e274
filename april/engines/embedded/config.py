"""Options of the embedded engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from april.config.schema import Config


class NoiseConfig(Config):
    """Gaussian noise on the sampler's norm weights, in stages (QeRL): none in the first, then falling from `start` to `end`."""

    start: float = Field(1e-2, gt=0, description="standard deviation in the second stage")
    end: float = Field(1e-4, gt=0, description="standard deviation in the last stage")
    stages: int = Field(10, ge=2, description="equal parts of the run; the first has no noise")
    total_steps: int | None = Field(None, ge=1, description="updates that the stages divide; unset: those of the run")
    seed: int | None = Field(None, ge=0, description="root of the noise; unset: that of the run")


class EmbeddedConfig(Config):
    """Continuous batching on torch (CPU or CUDA)."""

    type: Literal["embedded"] = "embedded"
    process: Literal["main", "child"] = Field(
        "main", description="where the engine computes; a child process that dies or hangs costs no sample, only time"
    )
    replicas: int = Field(1, ge=1, description="engines behind one pool; with process = child, each in a process of its own")
    max_running: int = Field(128, ge=1, description="samples decoded at once; more wait inside the engine")
    kv_tokens: int = Field(65_536, ge=1, description="tokens of KV memory that rows may reserve; overflow preempts the youngest")
    prefill_tokens: int = Field(4_096, ge=1, description="prompt tokens computed between two decode steps")
    report_every_tokens: int = Field(256, ge=1, description="a running sample reports its tokens at least this often")
    steps_per_poll: int = Field(32, ge=1, description="decode steps of one poll; it returns earlier when a sample ends")
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = Field("auto", description="numerics; auto keeps the model's own")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; unset leaves torch's own choice")
    share_prefix: bool = Field(True, description="copy the KV of a common prefix instead of computing it again")
    retain_parked: bool = Field(True, description="keep the KV of parked samples in spare room until they are resumed")
    retain_finished: bool = Field(False, description="keep the KV of finished samples in spare room for children forked later")
    max_draft_tokens: int = Field(0, ge=0, description="tokens guessed ahead and verified in one step; 0 turns speculation off")
    draft_match_tokens: int = Field(3, ge=1, description="tokens that have to agree with earlier text before a guess is made")
    draft_adaptive: bool = Field(True, description="stop guessing where measured acceptance does not pay for it")
    draft_overhead_rows: int = Field(16, ge=0, description="what a decode step costs besides its rows, in rows")
    decode_chunk_steps: int = Field(
        1, ge=1, description="decode steps between two looks of the host; above 1 sampling and stops stay on the device"
    )
    native: bool = Field(
        True,
        description="decode by compiled code where it serves (float32 on a CPU, lean forward, g++); built once, kept in a cache",
    )
    cuda_graphs: bool = Field(
        False, description="replay captured decode steps; needs CUDA and the lean forward; this has not run on a GPU yet"
    )
    forward: Literal["auto", "lean", "transformers"] = Field(
        "auto", description="lean: own forward (Qwen3, Qwen2, Llama); transformers: the model's; auto takes lean where it can"
    )

    record_routes: bool = Field(
        False, description="mixtures of experts: record each token's experts for `training.replay_routes` (R3)"
    )
    noise: NoiseConfig | None = Field(None, description="noise on the norms of the sampler's weights, never the trainer's (QeRL)")

    @model_validator(mode="after")
    def _one_way_to_skip_looks(self) -> EmbeddedConfig:
        if self.max_draft_tokens and (self.decode_chunk_steps > 1 or self.cuda_graphs):
            raise ValueError("max_draft_tokens needs a look at every step: remove it, or decode_chunk_steps and cuda_graphs")
        if self.record_routes and self.forward == "lean":
            raise ValueError('record_routes is for mixtures of experts, which forward = "lean" does not know: remove one of them')
        return self
