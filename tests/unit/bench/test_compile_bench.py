"""The compiled step: same logits in every way, and the arithmetic of what a compilation wins back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from april.bench import compile_bench
from april.bench.compile_bench import CompileOptions, DecodeSteps, products_outside_graphs, run_compile_bench, steps_to_pay
from april.cli.bench import app
from april.core.errors import DataError, ModelError
from april.models.linear import FrozenLinear


def test_a_compilation_pays_after_its_seconds_over_those_of_a_step() -> None:
    assert steps_to_pay(8.0, own_s=0.0205, compiled_s=0.0200) == 16000
    assert steps_to_pay(8.0, own_s=0.02, compiled_s=0.02) is None


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """torch.compile that gives the function back; a real one takes seconds."""
    asked: list[dict[str, Any]] = []

    def compile_nothing(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(compile_bench, "_ROUND_S", 0.0)
    return asked


def test_every_step_is_timed_and_gives_the_same_logits(uncompiled: list[dict[str, Any]]) -> None:
    steps = DecodeSteps(CompileOptions("tiny", rows=3, context_tokens=20))
    with torch.inference_mode():
        own, static = steps.own(), steps.static()
        assert own.shape == (3, 256) and torch.allclose(own, static, atol=1e-5)
        assert torch.equal(steps.own(), own), "a step leaves what the next one reads"
    found = run_compile_bench(CompileOptions("tiny", rows=3, context_tokens=20, rounds=2, threads=1), lambda _line: None)
    assert {name: value["num"] for name, value in found["step_s"].items()} == {"own": 2, "static": 2, "compiled": 2}
    assert uncompiled == [{"dynamic": False}] * 2


def test_other_logits_are_refused(uncompiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    right = DecodeSteps.compiled
    monkeypatch.setattr(DecodeSteps, "compiled", lambda steps: right(steps) + 0.001)
    with pytest.raises(ModelError, match="other logits"):
        run_compile_bench(CompileOptions("tiny", rows=2, context_tokens=4, threads=1), lambda _line: None)


def test_products_are_the_engines_own_again_afterwards() -> None:
    before = FrozenLinear.__call__, FrozenLinear.added_to
    with pytest.raises(KeyError), products_outside_graphs():
        changed = FrozenLinear.__call__ is not before[0]
        raise KeyError("x")
    assert changed and (FrozenLinear.__call__, FrozenLinear.added_to) == before


def test_a_row_has_room_for_the_token_that_is_written() -> None:
    assert [CompileOptions(context_tokens=count).capacity for count in (100, 127, 128)] == [128, 128, 256]
    with pytest.raises(DataError, match="fewer positions"):
        CompileOptions(context_tokens=1024)


def test_from_the_command_line(uncompiled: list[dict[str, Any]], tmp_path: Path) -> None:
    sizes = ["--model", "tiny", "--batch", "2,4", "--context-tokens", "4", "--rounds", "1", "--threads", "1"]
    done = CliRunner().invoke(app, ["compile", *sizes, "--json", "--keep", str(tmp_path / "compile.json")])
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "compile.json").read_text())
    assert [item["options"]["rows"] for item in kept["steps"]] == [2, 4] and kept["benchmark"] == "compile"
    assert len(uncompiled) == 2
