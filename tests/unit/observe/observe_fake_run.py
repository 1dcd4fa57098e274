"""A run folder like a real one, made by a small simulation of slots, parking and learning. Deterministic."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

RECIPE = """name = "quickstart"
seed = 0
[model]
path = "package:tiny"
[schedule]
type = "april"
over_provision = 1.5
max_lag_steps = 4
[algorithm]
preset = "grpo"
"""
SLOTS, DELIVERED, ISSUED = 24, 32, 48
EVIL = "<script>alert('x')</script> & <b>bold</b>"


def make_run(folder: Path, num_steps: int = 40, *, schedule: str = "april", seed: int = 0) -> Path:
    """Write all files of a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    world = World(rng, schedule)
    metrics = [world.step(step, num_steps) for step in range(num_steps)]
    (folder / "recipe.toml").write_text(RECIPE.replace("april", schedule, 1) if schedule != "april" else RECIPE)
    environment = {"python": "3.11.9", "cpu": "Test CPU", "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    summary = {
        "status": "finished",
        "wall_s": world.now_s,
        "ledger_balanced": True,
        "gains": {"sampled": {"low": 0.21, "high": 0.38}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    _write(folder / "metrics.jsonl", metrics)
    _write(folder / "evaluations.jsonl", _evaluations(metrics, rng))
    _write(folder / "transcripts.jsonl", _transcripts(num_steps))
    _write(folder / "timeline.jsonl", world.timeline)
    return folder


class World:
    """Slots that run samples of long-tailed length at one token a millisecond; what is unfinished at a step's end parks."""

    def __init__(self, rng: random.Random, schedule: str) -> None:
        self.rng, self.partial = rng, schedule == "april"
        self.now_s = 0.0
        self.parked: list[tuple[str, int, int, float]] = []
        self.whole: dict[str, int] = {}
        self.timeline: list[dict[str, Any]] = []
        self.serial = self.parked_total = self.resumed_total = self.tokens = 0
        self.issued_tokens = self.issued = self.delivered_tokens = self.delivered = 0

    def step(self, step: int, num_steps: int) -> dict[str, Any]:
        start_s = self.now_s
        queue = self._queue(step, num_steps)
        resumed = len(self.parked)
        for name, _, _, since_s in self.parked:
            self._sample(name, since_s, start_s, "parked", step)
        self.resumed_total += resumed
        wanted = DELIVERED if self.partial else len(queue)
        finished, running, rollout_end_s, busy_s = self._rollout(queue, wanted, start_s, step)
        self.parked = running
        self.parked_total += len(running)
        train_end_s = rollout_end_s + 0.12
        self._span("driver", "rollout", start_s, rollout_end_s, step)
        self._span("trainer", "update", rollout_end_s, train_end_s, step, loss=0.1)
        self.now_s = train_end_s + 0.01
        self._span("trainer", "publish", train_end_s, self.now_s, step)
        return self._metrics(step, num_steps, start_s, rollout_end_s, finished, busy_s)

    def _queue(self, step: int, num_steps: int) -> list[tuple[str, int, int]]:
        progress = step / max(1, num_steps - 1)
        queue = [(name, left, version) for name, left, version, _ in self.parked]
        for _ in range((ISSUED if self.partial else DELIVERED) - len(queue)):
            length = min(512, max(4, int(self.rng.lognormvariate(3.0 + 0.7 * progress, 0.9))))
            name = f"g{self.serial // 8}/e0/p{self.serial // 8 % 50}/m{self.serial % 8}"
            self.whole[name] = length
            queue.append((name, length, step))
            self.issued, self.issued_tokens, self.serial = self.issued + 1, self.issued_tokens + length, self.serial + 1
        return queue

    def _rollout(
        self, queue: list[tuple[str, int, int]], wanted: int, start_s: float, step: int
    ) -> tuple[Any, Any, float, float]:
        free = [start_s] * SLOTS
        runs = []
        for name, left, version in queue:
            slot = min(range(SLOTS), key=free.__getitem__)
            runs.append((free[slot], free[slot] + left / 1000, name, left, version))
            free[slot] += left / 1000
        ends = sorted(run[1] for run in runs)
        end_s = ends[min(wanted, len(ends)) - 1]
        finished, parked, busy_s = [], [], 0.0
        for begin_s, done_s, name, left, version in runs:
            if begin_s >= end_s:
                parked.append((name, left, version, end_s))
                continue
            until_s = min(done_s, end_s)
            busy_s += until_s - begin_s
            self._sample(name, begin_s, until_s, "running", step)
            self.timeline.append(
                {"counter": "running", "time_s": begin_s, "value": self.rng.randint(SLOTS // 2, SLOTS), "step": step}
            )
            if done_s <= end_s:
                finished.append((self.whole[name], step - version))
            else:
                parked.append((name, max(1, left - int((end_s - begin_s) * 1000)), version, end_s))
        self.timeline.append({"counter": "parked", "time_s": end_s, "value": len(parked), "step": step})
        return finished, parked, end_s, busy_s

    def _metrics(
        self, step: int, num_steps: int, start_s: float, rollout_end_s: float, finished: Any, busy_s: float
    ) -> dict[str, Any]:
        lengths, lags = sorted(length for length, _ in finished), sorted(lag for _, lag in finished)
        self.tokens += sum(lengths)
        self.delivered, self.delivered_tokens = self.delivered + len(lengths), self.delivered_tokens + sum(lengths)
        progress = step / max(1, num_steps - 1)
        accuracy = min(1.0, max(0.0, 0.2 + 0.5 * progress + self.rng.gauss(0, 0.05)))
        rollout_s = rollout_end_s - start_s
        delivered_mean, issued_mean = self.delivered_tokens / self.delivered, self.issued_tokens / self.issued
        return {
            "step": step, "version": step, "time_s": self.now_s, "rollout_s": rollout_s, "train_s": 0.12, "publish_s": 0.01,
            "step_s": self.now_s - start_s, "reward_mean": accuracy * 0.95, "accuracy": accuracy,
            "length_mean": sum(lengths) / len(lengths), "length_p50": lengths[len(lengths) // 2], "length_p99": lengths[-1],
            "length_max": lengths[-1], "delivered_mean_tokens": delivered_mean, "issued_mean_tokens": issued_mean,
            "length_bias": delivered_mean / issued_mean, "lag_mean": sum(lags) / len(lags),
            "lag_p95": lags[int(0.95 * len(lags))], "lag_max": lags[-1],
            "stale_token_fraction": sum(lag > 0 for lag in lags) / len(lags), "segments_mean": 1.2,
            "parked_groups": len(self.parked) // 8, "parked_samples": len(self.parked), "ready_groups": 1,
            "parked_total": self.parked_total, "resumed_total": self.resumed_total, "evicted_total": 0,
            "filtered_total": step, "failed_total": 0, "issued_total": self.issued, "trained_total": self.delivered,
            "tokens_generated": self.tokens, "tokens_per_s": sum(lengths) / (self.now_s - start_s),
            "idle_fraction": 1 - busy_s / (SLOTS * rollout_s), "loss": self.rng.gauss(0, 0.1),
            "grad_norm": abs(self.rng.gauss(0.5, 0.1)), "lr": 1e-3, "clip_fraction": 0.01 * progress,
            "entropy": 1.4 - progress, "mismatch_mean_abs": 1e-6, "tis_mean": 1.0 if step else None, "kl_extra": 0.01 * step,
            "ledger_balanced": True,
        }  # fmt: skip

    def _sample(self, name: str, start_s: float, end_s: float, state: str, step: int) -> None:
        self.timeline.append({"track": "sample", "name": name, "start_s": start_s, "end_s": end_s, "state": state, "step": step})

    def _span(self, track: str, name: str, start_s: float, end_s: float, step: int, **args: float) -> None:
        self.timeline.append({"track": track, "name": name, "start_s": start_s, "end_s": end_s, "step": step, "args": args})


def _evaluations(metrics: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    out = []
    every = max(1, len(metrics) // 5)
    for index in range(0, len(metrics) + 1, every):
        for mode, bonus in (("greedy", 0.04), ("sampled", 0.0)):
            accuracy = 0.2 + bonus + 0.5 * index / len(metrics) + rng.gauss(0, 0.01)
            time_s = metrics[index - 1]["time_s"] if index else 0.0
            out.append({
                "step": index, "time_s": time_s, "mode": mode, "temperature": float(mode == "sampled"), "n_problems": 512,
                "num_samples": 512, "accuracy": accuracy, "low": accuracy - 0.04, "high": accuracy + 0.04, "length_mean": 30.0,
                "pass_at": {"1": accuracy},
            })  # fmt: skip
    return out


def _transcripts(num_steps: int) -> list[dict[str, Any]]:
    out = []
    for step in sorted({0, num_steps // 2, num_steps - 1}):
        for prompt in ("p1", "p2"):
            long = step > 0
            text = ("12+30=42, 42*2=84, " * 6 if long else "") + f"answer 84 {EVIL if prompt == 'p1' else ''}"
            half = text.find("42*2")
            parts = [[0, 20, step - 1], [20, 48, step]] if long else [[0, 6, 0]]
            ends = [half, len(text)] if long else [len(text)]
            good = {
                "text": text,
                "reward": 1.0,
                "correct": long,
                "tokens": parts[-1][1],
                "stop": "eos",
                "segments": parts,
                "text_ends": ends,
            }
            bad = {
                "text": "7",
                "reward": None,
                "correct": False,
                "tokens": 1,
                "stop": "eos",
                "segments": [[0, 1, step]],
                "failure": EVIL,
            }
            record = {"step": step, "prompt_id": prompt, "group": f"g{step}/e0/{prompt}", "prompt": f"(12+30)*2 = ? {EVIL}"}
            out.append(record | {"responses": [good, bad]})
    return out


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
