"""Options of the embedded engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config


class EmbeddedConfig(Config):
    """Continuous batching on torch, in this process (CPU or CUDA)."""

    type: Literal["embedded"] = "embedded"
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
    forward: Literal["auto", "lean", "transformers"] = Field(
        "auto", description="lean: own forward (Qwen3, Qwen2, Llama); transformers: the model's; auto takes lean where it can"
    )
