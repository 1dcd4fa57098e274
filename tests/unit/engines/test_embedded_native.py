"""The engine with and without compiled decoding: the same samples, and a word where it cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.embedded.forward import LeanForward
from april.engines.embedded.select import make_forward
from april.models import kernel as built
from april.models.kv_rows import KvRows
from april.testing.engine_run import EngineRun, same_tokens
from april.testing.toy_model import toy_model

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernel with")
SIZES = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2}


def samples(count: int = 12) -> list[Sample]:
    """Of prompts and limits of many lengths."""
    found = []
    for index in range(count):
        prompt = Prompt(f"p{index}", np.arange(2, 4 + 5 * index, dtype=np.int32) % 50)
        spec = SamplingSpec(max_new_tokens=10 + 12 * index, seed=7)
        found.append(Sample(GroupId(0, 0, prompt.id).member(0), prompt, spec))
    return found


def results(abort_at: int | None = None, **options: object) -> list[Sample]:
    """All samples, run to their ends; parked and resumed once where asked."""
    config = EmbeddedConfig(max_running=8, steps_per_poll=4, **{"kv_tokens": 4096, **options})  # type: ignore[arg-type]
    run = EngineRun(EmbeddedEngine(toy_model(**SIZES), clock=VirtualClock(), config=config))
    run.submit(samples())
    if abort_at is not None:
        for _ in range(abort_at):
            run.poll()
        run.engine.abort()
        run.drain()
        run.submit([sample for sample in run.results(samples()) if sample.stop is None])
    run.drain()
    return run.results(samples())


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"abort_at": 5}, {"kv_tokens": 700}], ids=["whole", "parked", "preempted"])
def test_the_samples_are_those_of_the_operators(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    begin = KvRows.begin_step
    monkeypatch.setattr(KvRows, "begin_step", lambda rows: (steps.append(rows.size), begin(rows))[1])
    compiled = results(**options)  # type: ignore[arg-type]
    assert len(set(steps)) > 3, "rows joined and left"
    done = len(steps)
    plain = results(**options, native=False)  # type: ignore[arg-type]
    assert len(steps) == done, "and it can be turned off"
    same_tokens(compiled, plain, 1e-4)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {"native": False}),
        (torch.float32, {"max_draft_tokens": 2}),
        (torch.float32, {"decode_chunk_steps": 4}),
        (torch.float32, {"dtype": "bfloat16"}),
    ],
)
def test_what_it_does_not_serve_runs_on_operators(
    dtype: torch.dtype, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: pytest.fail("nobody asked for a compiler"))
    monkeypatch.setenv("CXX", "/nowhere/compiler")
    built.kernel.cache_clear()
    forward = make_forward(toy_model(dtype=dtype, **SIZES), EmbeddedConfig(**options))  # type: ignore[arg-type]
    assert isinstance(forward, LeanForward) and forward._kernel is None


def test_sizes_that_are_no_multiples_run_on_operators() -> None:
    forward = make_forward(toy_model(hidden_size=32, num_heads=4), EmbeddedConfig())
    assert isinstance(forward, LeanForward) and forward._kernel is None


def test_without_a_compiler_it_warns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built.kernel.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"the C\+\+ compiler does not run where: /nowhere/compiler.*engine.native = false"):
        found = results()
    same_tokens(found, results(native=False), 0.0)
