"""A `vllm serve` that April starts: its command, its log, and its end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from april.core.errors import ResourceError
from april.engines.vllm.config import VllmServerConfig
from april.engines.vllm.serve import FOLDERS

_LOG_LINES = 4
_END_S = 10.0


class ServerProcess:
    """A running server that listens on a Unix socket in a folder of its own, where nobody else can reach it.

    Args:
        module: a Hugging Face model of the shape that is served; its weights are sent later.
        config: budgets.
        folders: removed with the server, however this process ends.
    """

    def __init__(self, module: Any, config: VllmServerConfig, folders: Sequence[Path] = ()) -> None:
        from april.engines.vllm.start import save_shape

        self._folder = Path(tempfile.mkdtemp(prefix="april-vllm-"))
        save_shape(module, str(self._folder))
        self._log = self._folder / "server.log"
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",  # where vLLM keeps pause, resume and weight updates
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(config.memory_gib)),
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
            "VLLM_NO_USAGE_STATS": "1",
            FOLDERS: os.pathsep.join(map(str, (self._folder, *folders))),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "april.engines.vllm.serve", *self._arguments(module, config)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    @property
    def url(self) -> str:
        """For `Client`."""
        return f"unix:{self._folder / 'socket'}"

    @property
    def ended(self) -> str | None:
        """How the server ended, with the last lines of its log; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"the server ended with code {code}; its last words: {' | '.join(lines[-_LOG_LINES:])[-600:]}"

    def ended_within(self, seconds: float) -> str | None:
        """How the server ended, where it does so within this time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self.ended

    def check(self) -> None:
        """While it starts.

        Raises:
            ResourceError: the server ended.
        """
        if (told := self.ended) is not None:
            raise ResourceError(
                "a vLLM server does not start",
                where="engine.type",
                got=told,
                expected="a server that answers",
                hint="docs/engine_vllm.md says how to install vLLM",
            )

    def close(self) -> None:
        """End the server with all its processes, and remove its folder."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _arguments(self, module: Any, config: VllmServerConfig) -> list[str]:
        from april.engines.vllm.start import BLOCK_TOKENS, batched_tokens, can_sleep, chunks_prefill, dtype_of

        options: dict[str, Any] = {
            "--model": self._folder,
            "--uds": self._folder / "socket",
            "--runner": "generate",
            "--load-format": "dummy",
            "--dtype": dtype_of(module, config),
            "--max-num-seqs": config.max_running,
            "--block-size": BLOCK_TOKENS,
            "--logprobs-mode": "processed_logprobs",
            "--max-logprobs": -1,
            "--tensor-parallel-size": config.tensor_parallel,
            "--gpu-memory-utilization": config.gpu_memory_fraction,
            "--stream-interval": config.stream_every_tokens,
            "--scheduling-policy": "priority",
            "--generation-config": "vllm",
            "--weight-transfer-config": json.dumps({"backend": "april"}),
            "--worker-extension-cls": "april.engines.vllm.extension.AprilWorker",
        }
        if config.max_model_tokens is not None:
            options["--max-model-len"] = config.max_model_tokens
        if not chunks_prefill(config):
            options["--max-num-batched-tokens"] = batched_tokens(module, config)
        if config.kv_tokens is not None:
            options["--num-gpu-blocks-override"] = -(-config.kv_tokens // BLOCK_TOKENS) + 1
        flags = ["--enable-scale-out", "--skip-tokenizer-init", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        flags += ["--enforce-eager"] if config.enforce_eager else []
        flags += ["--enable-sleep-mode"] if can_sleep(config) else []
        flags += [] if chunks_prefill(config) else ["--no-enable-chunked-prefill"]
        flags += ["--enable-prefix-caching" if config.prefix_caching else "--no-enable-prefix-caching"]
        return [*(str(part) for option in options.items() for part in option), *flags, *config.arguments]
