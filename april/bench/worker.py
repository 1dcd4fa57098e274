"""The child process: `python -m april.bench.worker PEER` answers commands, one line of JSON each.

    {"do": "open", "setup": {...}}                           -> {"version": ...} or {"missing": reason}
    {"do": "generate", "prompts": ..., "max_new_tokens": ...} -> {"wall_s": ..., "num_steps": ..., "num_prefills": ...}
    {"do": "overhead", "prompts": ...}                       -> what `AprilEmbedded.python_overhead` returns
    {"do": "make", "model": ..., "folder": ...}              -> {}: writes the random model
    {"do": "probe", "model": ..., "rows": ..., ...}          -> what `probes.measure` returns

It imports only what its peer needs, so that another interpreter can run it without April's dependencies.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
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
        arguments = {key: value for key, value in command.items() if key != "do"}
        replies = {
            "open": self._open,
            "generate": self._generate,
            "overhead": self._overhead,
            "make": make_model,
            "probe": _probe,
        }
        return replies[command["do"]](**arguments)

    def _open(self, setup: dict[str, Any]) -> dict[str, Any]:
        module, _, attribute = PEERS[self._name].partition(":")
        try:
            self._peer = getattr(importlib.import_module(module), attribute)(Setup(**setup))
        except ImportError as error:
            return {"missing": f"{type(error).__name__}: {error}"}
        return {"version": self._peer.version}

    def _generate(self, prompts: list[list[int]], max_new_tokens: list[int]) -> dict[str, Any]:
        peer: Peer = self._peer
        started_s = time.perf_counter()
        done = peer.generate(prompts, max_new_tokens)
        wall_s = time.perf_counter() - started_s
        if list(done.num_tokens) != list(max_new_tokens):
            wrong = [index for index, (a, b) in enumerate(zip(done.num_tokens, max_new_tokens, strict=True)) if a != b]
            raise EngineError(
                "an engine did not generate the lengths it was asked for", where=self._name, got=f"requests {wrong[:8]}"
            )
        return {"wall_s": wall_s, "num_steps": done.num_steps, "num_prefills": done.num_prefills}

    def _overhead(self, prompts: list[list[int]]) -> dict[str, Any]:
        reply: dict[str, Any] = self._peer.python_overhead(prompts)
        return reply

    def close(self) -> None:
        """End the peer."""
        if self._peer is not None:
            self._peer.close()


def make_model(model: str, folder: str) -> dict[str, Any]:
    """Write a model with random weights as Hugging Face saves it."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(WEIGHT_SEED)
    Qwen3ForCausalLM(Qwen3Config(**shape_named(model).hf_config(), dtype="float32")).save_pretrained(folder)
    return {}


def _probe(model: str, rows: list[int], num_bytes: int, threads: int) -> dict[str, Any]:
    from april.bench.probes import measure

    return measure(shape_named(model), rows, num_bytes, threads)


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
