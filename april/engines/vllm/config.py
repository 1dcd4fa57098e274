"""Options of the two vLLM engines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from april.config.schema import Config


class _Common(Config):
    """What both take."""

    max_model_tokens: int | None = Field(None, ge=1, description="longest prompt plus response; unset is the model's own limit")
    report_every_tokens: int = Field(256, ge=1, description="a running sample reports its tokens at least this often")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="numerics; auto keeps the model's own")
    prefix_caching: bool = Field(True, description="share the KV of equal prefixes; it never outlives the weights that made it")
    enforce_eager: bool = Field(True, description="no compiled or captured graphs: a quicker start, slower steps on a GPU")
    seeded: bool = Field(True, description="a random stream of its own for each sample; off is faster and cannot be repeated")
    entropy_top_k: int = Field(
        0,
        ge=0,
        description="sampling.entropy records estimates from so many likely tokens, all others counted as one: a lower bound; "
        "0 records exact entropies, for small vocabularies only",
    )
    memory_gib: int = Field(1, ge=1, description="KV memory on a CPU, which vLLM takes in whole GiB")
    gpu_memory_fraction: float = Field(0.5, gt=0, le=1, description="share of a GPU's memory that vLLM may take")
    sleeps: bool = Field(
        False, description="give a GPU's memory back while a trainer on the same device computes; without CUDA nothing sleeps"
    )


class VllmConfig(_Common):
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
    steps_per_poll: int = Field(16, ge=1, description="decode steps of one poll; it returns earlier when a sample ends")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one engine spreads over")


class VllmServerConfig(_Common):
    """vLLM's HTTP server: one that April starts, or those at the given addresses. April's side has a process of its own."""

    type: Literal["vllm_server"] = "vllm_server"
    process: Literal["child"] = Field("child", description="where replies are read: always a process of its own")
    urls: tuple[str, ...] = Field(
        (),
        description="addresses of running servers, one engine each; none: April starts one for each engine, on this machine",
    )
    replicas: int = Field(1, ge=1, description="servers behind one pool; with urls there are as many as those")
    threads: int | None = Field(None, ge=1, description="CPU threads of a server that April starts; unset takes the model's")
    api_key: str | None = Field(None, description="name of the environment variable that holds the key the servers ask for")
    weights_folder: str | None = Field(
        None,
        description="folder for the files that carry weights; servers on other machines must see it under the same path. Unset: "
        "in memory where the system has /dev/shm, else a temporary folder",
    )
    silence_s: float = Field(60.0, gt=0, description="a server that has work and sends nothing for this long is given up")
    max_running: int = Field(128, ge=1, description="samples decoded at once; more wait on April's side")
    kv_tokens: int | None = Field(None, ge=1, description="tokens of KV memory of a server that April starts; unset as for vllm")
    stream_every_tokens: int = Field(8, ge=1, description="tokens in one message of a server that April starts")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one server spreads over")
    arguments: tuple[str, ...] = Field((), description="further arguments for a server that April starts")

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_urls(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("urls") and "replicas" not in data:
            return {**data, "replicas": len(data["urls"])}
        return data

    @model_validator(mode="after")
    def _one_engine_each(self) -> VllmServerConfig:
        if self.urls and self.replicas != len(self.urls):
            raise ValueError(
                f"{len(self.urls)} urls are {len(self.urls)} engines, but replicas = {self.replicas}: leave that out"
            )
        return self
