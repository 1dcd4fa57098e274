"""The profile of a decode step: exclusive times, rates from literal numbers, and a real run of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from april.bench import profile as profile_module
from april.bench.peers import april_embedded
from april.bench.profile import PARTS, ProfileOptions, Timers, profile_table, run_profile, timed_engine
from april.bench.shapes import SHAPES
from april.cli.bench import app
from april.core.errors import DataError
from april.engines.embedded.config import EmbeddedConfig
from april.models.kv import KvBucket


class Clock:
    """A clock that each reading moves on by one second."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_nested_calls_are_charged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "time", Clock())
    timers = Timers()
    inner = timers.timed("dense products", lambda: 7)
    outer = timers.timed("sampling", lambda: inner() + inner())
    assert outer() == 14 and sum(timers.seconds.values()) == 0.0, "nothing is timed before the start"
    timers.start()
    assert outer() == 14
    timers.stop()
    # Readings: start, into sampling, into and out of products twice, out of sampling, stop.
    assert {part: seconds for part, seconds in timers.seconds.items() if seconds} == {
        "Python and bookkeeping": 2.0,
        "sampling": 3.0,
        "dense products": 2.0,
    }


def test_a_call_that_fails_leaves_the_timers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "time", Clock())
    timers = Timers()

    def fails() -> None:
        raise KeyError("x")

    timers.start()
    with pytest.raises(KeyError):
        timers.timed("sampling", fails)()
    timers.stop()
    assert (timers.seconds["sampling"], timers.seconds["Python and bookkeeping"]) == (1.0, 2.0)


def test_the_engine_is_itself_again_afterwards() -> None:
    before = KvBucket.attend
    with pytest.raises(KeyError), timed_engine(Timers()):
        changed = KvBucket.attend is not before
        raise KeyError("x")
    assert changed and KvBucket.attend is before


def test_a_tiny_model_is_profiled() -> None:
    said: list[str] = []
    found = run_profile(ProfileOptions("tiny", rows=4, new_tokens=96, rounds=1, threads=1, probe_s=0.002), said.append)
    parts = {entry["part"]: entry for entry in found["parts"]}
    assert tuple(parts) == PARTS and len(said) == 1
    assert sum(entry["share"] for entry in parts.values()) == pytest.approx(1.0)
    assert sum(entry["step_s"] for entry in parts.values()) >= found["timed_step_s"], "every second is charged"
    assert all(parts[part]["step_s"] > 0 for part in PARTS)
    # Steps 33 to 96 behind prompts of 32 tokens: KV of 63 tokens before, of 127 after.
    assert found["context_tokens"] == pytest.approx((63 + 127) / 2 + 0.5)
    assert parts["dense products"]["amount"] == 4 * 2 * (2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64) + 64 * 256)
    assert parts["attention products"]["amount"] == pytest.approx(95.5 * 4 * 512)
    assert parts["KV append"]["amount"] == 4 * 512
    assert parts["sampling"]["amount"] == 4 * 256 * 4
    flops, copied = found["probes"]["matmul_flops_per_s"], found["probes"]["copy_bytes_per_s"]
    assert found["bound_s"] == pytest.approx(4 * SHAPES["tiny"].flops_per_token / flops + 95.5 * 4 * 512 / copied)
    assert found["of_the_bound"] == pytest.approx(found["bound_s"] / found["step_s"])
    assert "norms, rotary, elementwise" in profile_table([found])


def test_the_table_shows_shares_and_rates() -> None:
    entry = {"part": "dense products", "step_s": 0.010, "share": 0.5, "unit": "flops", "per_s": 8e10, "of_probe": 0.8}
    rest = {"part": "Python and bookkeeping", "step_s": 0.010, "share": 0.5}
    found = {
        "model": "3m",
        "engine": {"dtype": "bfloat16"},
        "rows": 256,
        "threads": 2,
        "context_tokens": 112.0,
        "step_s": 0.02,
        "timed_step_s": 0.021,
        "probes": {"matmul_flops_per_s": 1e11, "copy_bytes_per_s": 2e10},
        "bound_s": 0.0125,
        "of_the_bound": 0.625,
        "parts": [entry, rest],
    }
    lines = profile_table([found]).splitlines()
    told = "20.00 ms a step (21.00 with timers), bound 12.50 ms (62%)"
    assert lines[0].startswith(f"3m, dtype = bfloat16, 256 rows, 112 tokens of context, 2 threads: {told}")
    assert lines[4:6] == [
        "| dense products | 10.00 | 50% | 80.0 GFLOP/s | 80% |",
        "| Python and bookkeeping | 10.00 | 50% |  |  |",
    ]


@pytest.mark.parametrize(("tokens", "message"), [(63, "too few tokens"), (1024, "fewer positions")])
def test_tokens_that_cannot_be_measured_are_refused(tokens: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ProfileOptions(new_tokens=tokens)


def test_drafts_are_refused() -> None:
    with pytest.raises(DataError, match="no fixed number of tokens"):
        ProfileOptions(engine={"max_draft_tokens": 4})


def test_the_engine_is_profiled_with_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EmbeddedConfig] = []
    made = april_embedded.EmbeddedEngine

    def engine(module: Any, *, clock: Any, config: EmbeddedConfig) -> Any:
        configs.append(config)
        return made(module, clock=clock, config=config)

    monkeypatch.setattr(april_embedded, "EmbeddedEngine", engine)
    options = ProfileOptions("tiny", 4, 8, 64, 1, threads=1, probe_s=0.002, engine={"decode_chunk_steps": 4, "dtype": "bfloat16"})
    found = run_profile(options, lambda _line: None)
    assert [(config.decode_chunk_steps, config.dtype) for config in configs] == [(4, "bfloat16")] * 2
    assert found["engine"] == {"decode_chunk_steps": 4, "dtype": "bfloat16"}
    assert all(entry["step_s"] > 0 for entry in found["parts"]), "chunks of steps are timed, too"


def test_the_command_prints_and_keeps_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[ProfileOptions] = []

    def fake(options: ProfileOptions, _say: object) -> dict[str, object]:
        asked.append(options)
        return {"model": options.model}

    monkeypatch.setattr(profile_module, "run_profile", fake)
    done = CliRunner().invoke(
        app,
        [
            "profile",
            "--model",
            "3m,25m",
            "--batch",
            "64",
            "--json",
            "--engine",
            "dtype=bfloat16",
            "--keep",
            str(tmp_path / "x" / "p.json"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["profiles"] == [{"model": "3m"}, {"model": "25m"}]
    assert [(options.model, options.rows) for options in asked] == [("3m", 64), ("25m", 64)]
    assert [options.engine for options in asked] == [{"dtype": "bfloat16"}] * 2
    kept = json.loads((tmp_path / "x" / "p.json").read_text())
    assert (kept["benchmark"], kept["profiles"]) == ("profile", [{"model": "3m"}, {"model": "25m"}])
    assert {"cpu", "torch"} <= kept["machine"].keys()
