"""Options of the vLLM engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config


class VllmConfig(Config):
    """vLLM, stepped in the process that it is in; needs the extra april-rl[vllm]."""

    type: Literal["vllm"] = "vllm"
    process: Literal["main", "child"] = Field(
        "main", description="where the engine computes; a child process that dies or hangs costs no sample, only time"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a child process; unset takes those of the model")
    replicas: int = Field(1, ge=1, description="engines behind one pool; with process = child, each in a process of its own")
    max_running: int = Field(128, ge=1, description="samples decoded at once; more wait inside the engine")
    kv_tokens: int | None = Field(
        None, ge=1, description="tokens of KV memory; unset lets vLLM take what its memory share allows"
    )
    max_model_tokens: int | None = Field(None, ge=1, description="longest prompt plus response; unset is the model's own limit")
    report_every_tokens: int = Field(256, ge=1, description="a running sample reports its tokens at least this often")
    steps_per_poll: int = Field(16, ge=1, description="decode steps of one poll; it returns earlier when a sample ends")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="numerics; auto keeps the model's own")
    prefix_caching: bool = Field(True, description="share the KV of equal prefixes; it never outlives the weights that made it")
    enforce_eager: bool = Field(True, description="no compiled or captured graphs: a quicker start, slower steps on a GPU")
    seeded: bool = Field(True, description="a random stream of its own for each sample; off is faster and cannot be repeated")
    memory_gib: float = Field(1.0, gt=0, description="KV memory on a CPU")
    gpu_memory_fraction: float = Field(0.5, gt=0, le=1, description="share of a GPU's memory that vLLM may take")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one engine spreads over")
