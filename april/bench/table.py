"""results.json as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from april.bench.case import APRIL

Json = Mapping[str, Any]


def markdown(results: Json) -> str:
    """The page that `april bench engine` writes beside results.json."""
    machine, settings = results["machine"], results["settings"]
    threads = settings["effort"]["threads"]
    load = machine.get("load_average")
    parts = [
        f"    {results['command']}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; Python {machine['python']}, torch {machine['torch']}; "
        f"{threads} thread{'s' if threads > 1 else ''} each, {settings['dtype']}, temperature {settings['temperature']:g}."
        + (f" Load average before: {load[0]:.2f}." if load else ""),
        _engines(results["engines"], settings["engine"]),
        _models(results["models"]),
        summary(results["cases"]),
        *(_case(case) for case in results["cases"]),
        _probes(results["cases"], threads),
    ]
    return "\n\n".join(parts) + "\n"


def changes_text(changes: Json) -> str:
    """Options of April's engine that are not its defaults, as they stand behind its name."""
    return "".join(f", {key} = {value}" for key, value in changes.items())


def _engines(engines: Json, changes: Json) -> str:
    lines = []
    for name, opened in engines.items():
        state = opened["version"] if "version" in opened else f"skipped: {opened['skipped']}"
        state += changes_text(changes) if name == APRIL else ""
        lines.append(f"- {name}: {state}")
    return "\n".join(lines)


def _models(models: Json) -> str:
    return "\n".join(f"- model {name}: {model['shape']}" for name, model in models.items())


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def summary(cases: Sequence[Json]) -> str:
    """One row a case: April's speed, its share of the bound, and how many times as fast as each peer it is."""
    peers = list(dict.fromkeys(name for case in cases for name in case["engines"] if name != APRIL))
    rows = []
    for case in cases:
        own = case["engines"][APRIL]
        ratios = [spread_text(case["ratios"][name], 2) + "x" if name in case["ratios"] else "" for name in peers]
        rows.append([case["name"], spread_text(own["tokens_per_s"], 0), f"{own['roofline_fraction']['median']:.0%}", *ratios])
    header = ("model/lengths/requests", "April, tokens/s", "of the bound", *(f"over {name}" for name in peers))
    return "### Summary\n\n" + rows_of(header, rows)


def _case(case: Json) -> str:
    lengths, roofline = case["lengths"], case["roofline"]
    title = (
        f"### {case['name']}\n\n{lengths['num']} requests, {lengths['total']} new tokens (median {lengths['median']:g}, "
        f"mean {lengths['mean']:.1f}, p99 {lengths['p99']:.0f}, max {lengths['max']}); static batches of "
        f"{case['static_batch_rows']}; bound {roofline['tokens_per_s']:.0f} tokens/s "
        f"({roofline['step_s'] * 1e3:.2f} ms a step, {roofline['kv_fraction']:.0%} of it KV)."
    )
    foreign = case["foreign_cpu_fraction"]
    if foreign is not None:
        title += f" Other processes took at most {foreign:.1%} of the machine in any round."
    header = ("engine", "tokens/s", "April is", "ms/step", "prompt tokens/s", "peak MiB", "of the bound", "rounds")
    return title + "\n\n" + rows_of(header, [_engine_row(name, engine, case) for name, engine in case["engines"].items()])


def _engine_row(name: str, engine: Json, case: Json) -> list[str]:
    if "tokens_per_s" not in engine:
        return [name, f"failed: {engine['failed']}", *[""] * 6]
    ratio = case["ratios"].get(name)
    peak = engine["peak_rss_bytes"]
    return [
        name,
        spread_text(engine["tokens_per_s"], 0),
        "" if ratio is None else spread_text(ratio, 2) + "x",
        f"{engine['step_s']['median'] * 1e3:.2f}",
        f"{engine['prefill_tokens_per_s']['median']:.0f}",
        "" if peak is None else f"{peak / 2**20:.0f}",
        f"{engine['roofline_fraction']['median']:.0%}",
        str(len(engine["rounds"])) + (" (failed)" if "failed" in engine else ""),
    ]


def spread_text(value: Json, digits: int) -> str:
    """The median, with the extremes in parentheses where there is more than one measurement."""
    low, middle, high = (f"{value[key]:.{digits}f}" for key in ("low", "median", "high"))
    return middle if value["num"] < 2 else f"{middle} ({low} to {high})"


def _probes(cases: Sequence[Json], threads: int) -> str:
    header = (
        "case",
        f"model's products, GFLOP/s (1 / {threads} threads)",
        "1024 x 1024, GFLOP/s",
        "copy, GB/s",
        "April's step, ms",
        "outside operators",
    )
    rows = [
        [
            case["name"],
            _pair(case["probe"], "matmul_flops_per_s"),
            _pair(case["probe"], "square_flops_per_s"),
            _pair(case["probe"], "copy_bytes_per_s"),
            f"{case['overhead']['step_s'] * 1e3:.2f}",
            f"{case['overhead']['outside_fraction']:.0%}",
        ]
        for case in cases
    ]
    return "### The machine in the same run, and Python's share of a step\n\n" + rows_of(header, rows)


def _pair(probe: Json, key: str) -> str:
    return f"{probe[key + '_single'] / 1e9:.0f} / {probe[key] / 1e9:.0f}"
