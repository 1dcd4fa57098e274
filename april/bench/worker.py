"""The child process: `python -m april.bench.worker PEER` answers commands, one line of JSON each.

    {"do": "open", "setup": {...}}                             -> {"version": ...} or {"missing": reason}
    {"do": "generate", "prompts", "max_new_tokens", "batch_rows"} -> {"wall_s", "num_steps", "num_prefills"}
    {"do": "overhead", "prompts"}                              -> what `AprilEmbedded.python_overhead` returns
    {"do": "make", "model", "folder"}                          -> {"torch": version}, when the random model is written
    {"do": "probe", "model", "rows", "num_bytes", "threads", "budget_s"} -> what `probes.measure` returns

It imports only what its peer needs, so that another interpreter can run it without April's dependencies.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from april.bench.peers.base import Peer, Setup
from april.bench.shapes import WEIGHT_SEED, shape_named
from april.core.errors import EngineError

PEERS = {
    "april": "april.bench.peers.april_embedded:AprilEmbedded",
    "transformers-static": "april.bench.peers.transformers_static:TransformersStatic",
    "transformers-continuous": "april.bench.peers.transformers_continuous:TransformersContinuous",
    "vllm": "april.bench.peers.vllm_cpu:VllmCpu",
}
"""Compared engines, April first. The worker "probe" has none: it makes models and measures the machine."""

PROBE = "probe"


class Worker:
    """Executes commands for one peer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._peer: Any = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """The reply to one command."""
        replies: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self._open,
            "generate": self._generate,
            "overhead": self._overhead,
            "make": make_model,
            "probe": _probe,
        }
        return replies[command["do"]](**{key: value for key, value in command.items() if key != "do"})

    def _open(self, setup: dict[str, Any]) -> dict[str, Any]:
        module, _, attribute = PEERS[self._name].partition(":")
        try:
            self._peer = getattr(importlib.import_module(module), attribute)(Setup(**setup))
        except ImportError as error:
            return {"missing": f"{type(error).__name__}: {error}"}
        return {"version": self._peer.version}

    def _generate(self, prompts: list[list[int]], max_new_tokens: list[int], batch_rows: int) -> dict[str, Any]:
        peer: Peer = self._peer
        done = peer.generate(prompts, max_new_tokens, batch_rows)
        if list(done.num_tokens) != list(max_new_tokens):
            wrong = [index for index, (a, b) in enumerate(zip(done.num_tokens, max_new_tokens, strict=True)) if a != b]
            raise EngineError(
                "an engine did not generate the lengths it was asked for", where=self._name, got=f"requests {wrong[:8]}"
            )
        return {"wall_s": done.wall_s, "num_steps": done.num_steps, "num_prefills": done.num_prefills}

    def _overhead(self, prompts: list[list[int]]) -> dict[str, Any]:
        reply: dict[str, Any] = self._peer.python_overhead(prompts)
        return reply

    def close(self) -> None:
        """End the peer."""
        if self._peer is not None:
            self._peer.close()


def random_model(model: str) -> Any:
    """A Hugging Face model with random weights, in evaluation mode."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(WEIGHT_SEED)
    module: Any = Qwen3ForCausalLM
    return module(Qwen3Config(**shape_named(model).hf_config(), dtype="float32")).eval()


def make_model(model: str, folder: str) -> dict[str, Any]:
    """Write a model with random weights as Hugging Face saves it."""
    import torch

    random_model(model).save_pretrained(folder)
    return {"torch": torch.__version__}


def _probe(model: str, rows: list[int], num_bytes: int, threads: int, budget_s: float) -> dict[str, Any]:
    from april.bench.probes import measure

    return measure(shape_named(model), rows, num_bytes, threads, budget_s)


def main() -> None:
    """Serve until the input ends; whatever libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:  # the reason belongs to the parent, whatever it is
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
    worker.close()


if __name__ == "__main__":
    main()
