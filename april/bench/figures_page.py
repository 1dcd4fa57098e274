"""The page of kept results: what `--keep` wrote, as one Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from april.bench.case import APRIL
from april.bench.compile_bench import compile_table
from april.bench.learner_bench import learner_table
from april.bench.profile import profile_table
from april.bench.table import Json, changes_text, rows_of, spread_text, summary

_INTRODUCTION = {
    "engine": "April's engine against others on the same requests, in turn; medians with the smallest and largest round in "
    "parentheses.",
    "profile": "Every part of a decode step of all rows. Its bound has the mean context of these steps. Prefill is neither "
    "in it nor in the shares of whole requests, from which the time of the first tokens is taken off; but those count the steps "
    "that the profile takes for its warm-up. Probes and bound are of float32, whatever the engine computes in.",
    "compile": "`torch.compile` on the decode forward. Each combination of length classes and rows is a shape of its own, and "
    "is compiled for itself.",
    "learner": "A whole update of April's trainer against a loop written by hand over padded rows, on the same batch. Before, "
    "log-probs and gradients of both are compared: to 1e-5.",
    "grpo": "Seconds of TRL's `GRPOTrainer` over those of April, seed by seed, from the first step to the last; mean and 95 % "
    "interval. How: [GRPO against TRL](grpo_speed.md).",
}

_WITHOUT_GPU = """\
No figure of this page comes from a GPU; what is only of use there (`engine.cuda_graphs`) has never run on one and is off."""


def figures_page(kept: Sequence[Json]) -> str:
    """The page; what the results have in common stands once.

    Args:
        kept: contents of kept files.
    """
    parts = [
        "# Engine speed, measured",
        "What is compared, and how: [engine speed](engine_speed.md). This page is made from `docs/results/speed` by\n"
        "`docs/generate.py`, those results by the commands below with `--keep`. Threads are those of each engine.",
        "\n".join(dict.fromkeys(_machine(item["machine"]) for item in kept)),
    ]
    for kind, (title, body) in _SECTIONS.items():
        found = sorted((item for item in kept if item["benchmark"] == kind), key=_num_parameters)
        if found:
            commands = "\n".join(f"$ {item['command']}" for item in found)
            parts += [f"## {title}", _INTRODUCTION[kind], f"```console\n{commands}\n```", body(found)]
    return "\n\n".join(part.strip() for part in [*parts, _WITHOUT_GPU]) + "\n"


def _num_parameters(results: Json) -> int:
    """Of the largest model of an engine's results: small ones come first. Others stay in their order."""
    return max(model["parameters"] for model in results["models"].values()) if results["benchmark"] == "engine" else 0


def _machine(machine: Json) -> str:
    return (
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['system']}; Python {machine['python']}, torch {machine['torch']}"
    )


def _engine(results: Sequence[Json]) -> str:
    """Circumstances, ratios of all cases, and what else was measured of April."""
    cases = [case for item in results for case in item["cases"]]
    told = "\n".join(dict.fromkeys(f"- {_engines(item)}" for item in results))
    lengths = "\n".join(dict.fromkeys(f"- {_lengths(item)}" for item in results))
    return "\n\n".join([f"{told}\n{lengths}", summary(cases).partition("\n\n")[2], _april(cases)])


def _engines(results: Json) -> str:
    engines, threads = results["engines"], results["settings"]["effort"]["threads"]
    changes = changes_text(results["settings"]["engine"])
    versions = [
        f"{name} {opened['version']}{changes if name == APRIL else ''}" for name, opened in engines.items() if "version" in opened
    ]
    skipped = [f"{name} is skipped: {opened['skipped']}" for name, opened in engines.items() if "skipped" in opened]
    return f"{threads} thread{'s' if threads > 1 else ''} each: {', '.join(versions)}" + "".join(f"; {text}" for text in skipped)


def _lengths(results: Json) -> str:
    workload, kinds = results["settings"]["workload"], {case["workload"] for case in results["cases"]}
    parts = [f"prompts of {workload['prompt_tokens']} tokens, seed {workload['seed']}"]
    if "fixed" in kinds:
        parts.append(f"fixed: {workload['fixed_tokens']} new tokens each")
    if "lognormal" in kinds:
        parts.append(f"lognormal: mu {workload['mu']:g}, sigma {workload['sigma']:g}, cap {workload['cap_tokens']}")
    if "azure" in kinds:
        parts.append(f"azure: drawn from {workload['trace']}, cap {workload['cap_tokens']}")
    return "; ".join(parts)


def _april(cases: Sequence[Json]) -> str:
    rows = []
    for case in cases:
        engine, peak, foreign = case["engines"][APRIL], case["engines"][APRIL]["peak_rss_bytes"], case["foreign_cpu_fraction"]
        rows.append(
            [
                case["name"],
                str(case["lengths"]["total"]),
                spread_text({**engine["step_s"], **_scaled(engine["step_s"], 1e3)}, 2),
                spread_text(engine["prefill_tokens_per_s"], 0),
                "" if peak is None else f"{peak / 2**20:.0f}",
                f"{case['overhead']['outside_fraction']:.0%}",
                "" if foreign is None else f"{foreign:.1%}",
            ]
        )
    header = ("April", "new tokens", "ms/step", "prompt tokens/s", "peak MiB", "outside operators", "machine used by others")
    return rows_of(header, rows)


def _scaled(spread: Json, factor: float) -> dict[str, float]:
    return {key: spread[key] * factor for key in ("low", "median", "high")}


def _profile(results: Sequence[Json]) -> str:
    return profile_table([profile for item in results for profile in item["profiles"]])


def _compile(results: Sequence[Json]) -> str:
    return compile_table([step for item in results for step in item["steps"]])


def _learner(results: Sequence[Json]) -> str:
    return learner_table([model for item in results for model in item["models"]])


def _grpo(results: Sequence[Json]) -> str:
    rows = []
    for case in [case for item in results for case in item["cases"]]:
        name = f"{case['options']['model']}, {case['workload']}, {case['options']['steps']} steps"
        for side, speedup in case["speedup_over_trl"].items():
            gain, runs = case["accuracy_over_trl"][side], [f"{value:.1f}" for value in speedup["runs"]]
            interval = f"{speedup['mean']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f})"
            learnt = f"{gain['mean'] * 100:+.1f} ({gain['low'] * 100:+.1f} to {gain['high'] * 100:+.1f})"
            rows.append([name, side, ", ".join(runs), interval, learnt])
    return rows_of(("policy and lengths", "side", "TRL / April by seed", "mean", "accuracy over TRL's, points"), rows)


_SECTIONS: dict[str, tuple[str, Callable[[Sequence[Json]], str]]] = {
    "engine": ("Against other engines", _engine),
    "profile": ("Where a decode step goes", _profile),
    "compile": ("A compiled step", _compile),
    "learner": ("The training step", _learner),
    "grpo": ("Whole runs", _grpo),
}
