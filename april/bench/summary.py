"""From the measurements of one case to its numbers in results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from april.bench.arithmetic import Roofline, Spread, decode_roofline, ratio, spread
from april.bench.case import APRIL, Case, EngineRecord, Record
from april.bench.workload import describe_lengths
from april.core.errors import DataError


def best_probe(before: Record, after: Record) -> Record:
    """The better of two probes, number by number; times are better when small, rates when large."""
    best: Record = {"copy_bytes": before["copy_bytes"]}
    for key, value in before.items():
        if key == "matmul_step_s":
            best[key] = {rows: min(seconds, after[key][rows]) for rows, seconds in value.items()}
        elif key.endswith(("_per_s", "_per_s_single")):
            best[key] = max(value, after[key])
    return best


def summarise(case: Case, records: Mapping[str, EngineRecord], probe: Record, overhead: Record) -> Record:
    """The case as it stands in results.json."""
    seconds = {int(rows): value for rows, value in probe["matmul_step_s"].items()}
    roofline = decode_roofline(
        case.lengths, case.options.prompt_tokens, seconds, case.shape.kv_bytes_per_token, probe["copy_bytes_per_s"]
    )
    engines = {name: summarise_engine(case, record, roofline) for name, record in records.items()}
    rates = {name: _tokens_per_s(case, record.rounds) for name, record in records.items() if record.rounds}
    foreign = [item["foreign_cpu_fraction"] for record in records.values() for item in record.rounds]
    return {
        "name": case.name,
        "model": case.shape.name,
        "workload": case.kind,
        "requests": case.num_requests,
        "static_batch_rows": case.batch_rows,
        "lengths": describe_lengths(case.lengths),
        "probe": probe,
        "roofline": {
            "tokens_per_s": roofline.tokens_per_s,
            "step_s": roofline.step_s,
            "kv_fraction": roofline.kv_s / roofline.total_s,
        },
        "overhead": overhead,
        "engines": engines,
        "ratios": {name: ratio(rates[APRIL], values).to_json() for name, values in rates.items() if name != APRIL},
        "foreign_cpu_fraction": None if None in foreign else max(foreign),
    }


def _tokens_per_s(case: Case, rounds: Sequence[Record]) -> list[float]:
    total = int(case.lengths.sum())
    return [total / item["wall_s"] for item in rounds]


def summarise_engine(case: Case, record: EngineRecord, roofline: Roofline) -> Record:
    """Spreads over the rounds of one engine, and the rounds themselves."""
    if not record.rounds:
        return {"failed": record.failed or "it was given no round"}
    rounds = record.rounds
    prompt_tokens = case.num_requests * case.options.prompt_tokens
    decode_s = [item["wall_s"] - item["prefill_wall_s"] for item in rounds]
    steps = [item["num_steps"] - item["num_prefills"] for item in rounds]
    if min(decode_s) <= 0 or min(steps) <= 0:
        raise DataError("a workload is too short to tell decoding from prefill", where=case.name, hint="ask for more tokens")
    spreads: dict[str, Spread] = {
        "tokens_per_s": spread(_tokens_per_s(case, rounds)),
        "prefill_tokens_per_s": spread([prompt_tokens / item["prefill_wall_s"] for item in rounds]),
        "step_s": spread([seconds / count for seconds, count in zip(decode_s, steps, strict=True)]),
        "roofline_fraction": spread([roofline.total_s / seconds for seconds in decode_s]),
    }
    peaks = [item["peak_rss_bytes"] for item in rounds]
    out: Record = {name: value.to_json() for name, value in spreads.items()}
    out |= {"peak_rss_bytes": None if None in peaks else max(peaks), "rounds": rounds}
    return out | ({"failed": record.failed} if record.failed is not None else {})
