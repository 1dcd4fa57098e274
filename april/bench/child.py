"""A child process with one engine, seen from the benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import april
from april.bench import procfs
from april.core.errors import EngineError

_CLOSE_S = 20.0
_VLLM_PRELOADS = ("libtcmalloc_minimal.so.4", "libiomp5.so")
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class ChildFailed(EngineError):
    """A child ended, answered with an error, or did not answer in time."""


def preloads(python: str) -> dict[str, str]:
    """LD_PRELOAD with the libraries that vLLM's CPU build asks for, as far as the interpreter's environment has them."""
    folder = Path(python).absolute().parents[1] / "lib"
    found = [str(folder / name) for name in _VLLM_PRELOADS if (folder / name).exists()]
    return {"LD_PRELOAD": ":".join([*found, *filter(None, [os.environ.get("LD_PRELOAD")])])} if found else {}


class Child:
    """Starts `april.bench.worker` in a session of its own, so that it and its descendants can be ended together.

    Args:
        name: the worker's peer.
        python: interpreter.
        threads: CPU threads of its numeric libraries.
        log: file for all that it prints.
        limit_s: longest wait for an answer.
    """

    def __init__(self, name: str, python: str, threads: int, log: Path, limit_s: float) -> None:
        self.name, self._log, self._limit_s = name, log, limit_s
        environment = {**_QUIET, **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if python != sys.executable:
            # The other interpreter does not have April installed.
            root = str(Path(april.__file__).parents[1])
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        if name == "vllm":
            environment |= preloads(python)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "april.bench.worker", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        self._buffer = b""

    @property
    def pid(self) -> int:
        """Of the worker; vLLM has further processes below it."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            ChildFailed: with the reason; the child cannot be used any more after it ended or was too late.
        """
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise self._ended(do)
        self._signal(signal.SIGCONT)
        try:
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise self._ended(do) from error
        reply: dict[str, Any] = json.loads(self._read_line(do))
        self._signal(signal.SIGSTOP)
        if "error" in reply:
            raise ChildFailed("a compared engine failed", where=f"{self.name}: {do}", got=reply["error"], hint=f"see {self._log}")
        return reply

    def _read_line(self, do: str) -> bytes:
        stdout = self._process.stdout
        if stdout is None:
            raise ChildFailed("a benchmark process has no output", where=self.name)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(self._limit_s):
                    self.kill()
                    raise ChildFailed(
                        "a compared engine took too long", where=f"{self.name}: {do}", got=f"> {self._limit_s:.0f} s"
                    )
                part = os.read(stdout.fileno(), 1 << 16)
                if not part:
                    raise self._ended(do)
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self, do: str) -> ChildFailed:
        code = self._process.wait()
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing was printed"]
        return ChildFailed(
            "a benchmark process ended", where=f"{self.name}: {do}", got=f"exit code {code}: {last[0]}", hint=f"see {self._log}"
        )

    def _signal(self, number: signal.Signals) -> None:
        """To the whole session: between commands it is stopped, because vLLM's processes poll while they are idle."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def tree(self) -> list[int]:
        """Its process and all below it."""
        return procfs.tree(self.pid)

    def close(self) -> None:
        """End its input, wait, and kill what is left."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_S)
        self.kill()

    def kill(self) -> None:
        """End the whole session at once."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
