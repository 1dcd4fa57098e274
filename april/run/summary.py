"""What a run came to, folded from what it wrote; the same for a run that was continued."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from april.observe.sinks import plain, read_jsonl
from april.run.evaluate import gain


def summarise(folder: Path, ledger: Mapping[str, Any], balanced: bool) -> dict[str, Any]:
    """The summary of a run folder.

    Args:
        folder: with metrics.jsonl and evaluations.jsonl.
        ledger: the pool's final ledger.
        balanced: whether it balances now; every step's own finding is in metrics.jsonl.
    """
    rows = read_jsonl(folder / "metrics.jsonl")
    evaluations = read_jsonl(folder / "evaluations.jsonl")
    return {
        **_accuracies(evaluations),
        "steps": len(rows),
        "samples_trained": int(_total(rows, "num_samples")),
        "tokens_trained": int(_total(rows, "batch_tokens")),
        "tokens_generated": int(max((row.get("tokens_generated") or 0 for row in rows), default=0)),
        "wall_s": _last(rows, "time_s"),
        "rollout_s": _total(rows, "rollout_s"),
        "train_s": _total(rows, "train_s"),
        "idle_fraction": _weighted(rows, "idle_fraction", "engine_s"),
        "parked_total": ledger["parked_total"],
        "resumed_total": ledger["resumed_total"],
        "max_lag_steps": int(max((row.get("lag_max") or 0 for row in rows), default=0)),
        "mean_lag_steps": _weighted(rows, "lag_mean", "batch_tokens"),
        "stale_token_fraction": _weighted(rows, "stale_token_fraction", "batch_tokens"),
        "length_bias": _last(rows, "length_bias"),
        "ledger_balanced": balanced and all(row.get("ledger_balanced", True) for row in rows),
        "ledger": ledger,
    }


def _accuracies(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """First against last evaluation of each mode; the plain keys are those of sampling at temperature 1."""
    out: dict[str, Any] = {}
    for mode, suffix in (("sampled", ""), ("greedy", "_greedy")):
        records = [record for record in evaluations if record["mode"] == mode]
        first, last = records[0] if records else {}, records[-1] if len(records) > 1 else {}
        out |= {f"accuracy_before{suffix}": first.get("accuracy"), f"accuracy_after{suffix}": last.get("accuracy")}
        if len(records) > 1:
            out |= {f"{name}{suffix}": value for name, value in gain(first, last).items()}
        out |= {f"length_before{suffix}": first.get("length_mean"), f"length_after{suffix}": last.get("length_mean")}
        out.setdefault("n_eval", first.get("n_problems", 0))
        if first:
            out["n_eval"] = first["n_problems"]
    return out


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, readable by any JSON reader: what is not a number is null."""
    text = json.dumps(plain(summary), indent=1)
    aside = folder / "summary.json.tmp"
    aside.write_text(text + "\n")
    aside.replace(folder / "summary.json")


def _total(rows: Iterable[Mapping[str, Any]], key: str) -> float:
    return float(sum(row.get(key) or 0 for row in rows))


def _last(rows: list[dict[str, Any]], key: str) -> float | None:
    return rows[-1].get(key) if rows else None


def _weighted(rows: Iterable[Mapping[str, Any]], key: str, weight: str) -> float | None:
    pairs = [(row[key], row.get(weight) or 0) for row in rows if row.get(key) is not None]
    total = sum(w for _, w in pairs)
    return sum(value * w for value, w in pairs) / total if total else None
