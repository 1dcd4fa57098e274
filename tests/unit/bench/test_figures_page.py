"""The page of kept results, from literal numbers."""

from __future__ import annotations

from typing import Any

from april.bench.figures_page import figures_page

MACHINE = {"cpu": "Some CPU", "cores": 2, "system": "Linux x86_64", "python": "3.11", "torch": "2.13"}


def spread(median: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {"median": median, "low": low or median, "high": high or median, "num": 1 if low is None else 3}


def engine_results(model: str, parameters: int) -> dict[str, Any]:
    own = {
        "tokens_per_s": spread(8000.4, 7000, 9000),
        "roofline_fraction": spread(0.55),
        "step_s": spread(0.025, 0.02, 0.03),
        "prefill_tokens_per_s": spread(40000.0),
        "peak_rss_bytes": 2**30,
    }
    case = {
        "name": f"{model}/fixed/256",
        "workload": "fixed",
        "lengths": {"total": 32768},
        "engines": {"april": own, "vllm": own},
        "ratios": {"vllm": spread(1.5, 1.4, 1.6)},
        "overhead": {"outside_fraction": 0.08},
        "foreign_cpu_fraction": 0.012,
    }
    return {
        "benchmark": "engine",
        "command": f"april bench engine --model {model}",
        "machine": MACHINE,
        "settings": {
            "workload": {"prompt_tokens": 32, "fixed_tokens": 128, "seed": 0},
            "effort": {"threads": 2},
            "engine": {"decode_chunk_steps": 4},
        },
        "engines": {"april": {"version": "0.1"}, "vllm": {"version": "0.32"}, "other": {"skipped": "not installed"}},
        "models": {model: {"parameters": parameters}},
        "cases": [case],
    }


def test_engines_have_ratios_and_what_else_was_measured() -> None:
    page = figures_page([engine_results("3m", 3_300_000)])
    assert page.count("- Some CPU, 2 cores, Linux x86_64; Python 3.11, torch 2.13") == 1
    assert "```console\n$ april bench engine --model 3m\n```" in page
    assert "- 2 threads each: april 0.1, decode_chunk_steps = 4, vllm 0.32; other is skipped: not installed\n" in page
    assert "- prompts of 32 tokens, seed 0; fixed: 128 new tokens each\n" in page
    assert "| 3m/fixed/256 | 8000 (7000 to 9000) | 55% | 1.50 (1.40 to 1.60)x |" in page
    assert "| 3m/fixed/256 | 32768 | 25.00 (20.00 to 30.00) | 40000 | 1024 | 8% | 1.2% |" in page
    assert "The training step" not in page, "what was not measured has no section"


def test_smaller_models_come_first_and_the_machine_stands_once() -> None:
    page = figures_page([engine_results("100m", 102_000_000), engine_results("3m", 3_300_000)])
    assert "```console\n$ april bench engine --model 3m\n$ april bench engine --model 100m\n```" in page
    assert page.index("| 3m/fixed/256 | 8000") < page.index("| 100m/fixed/256 | 8000")
    assert [page.count(text) for text in ("- Some CPU", "- 2 threads each", "- prompts of", "over vllm")] == [1, 1, 1, 1]


def test_a_compiled_step_and_the_training_step_have_their_tables() -> None:
    step = {
        "options": {"model": "3m", "rows": 64},
        "compile_s": 8.04,
        "step_s": {"own": spread(0.004), "static": spread(0.005), "compiled": spread(0.0035)},
        "speedup": spread(1.14, 1.1, 1.2),
        "steps_to_pay": 16080,
    }
    case = {
        "name": "equal",
        "prompt_tokens": 8,
        "lengths": {"total": 8192, "max": 128},
        "tokens_per_s": {"april": spread(5000.0), "padded": spread(4000.0)},
        "ratio": spread(1.25),
    }
    compiled = {"benchmark": "compile", "command": "april bench compile", "machine": MACHINE, "steps": [step]}
    models = [{"options": {"model": "3m"}, "cases": [case]}]
    learner = {"benchmark": "learner", "command": "april bench learner", "machine": MACHINE, "models": models}
    page = figures_page([learner, compiled])
    assert "| 3m, 64 rows | 4.00 | 5.00 | 3.50 | 1.14 (1.10 to 1.20)x | 8.0 | 16080 |" in page
    assert "| 3m, equal | 8 | 8192 | 128 | 5000 | 4000 | 1.25x |" in page
    assert page.index("## A compiled step") < page.index("## The training step")


def test_whole_runs_have_their_ratios_and_accuracies() -> None:
    case = {
        "workload": "even",
        "options": {"model": "3m", "steps": 4},
        "speedup_over_trl": {"april": {"mean": 2.5, "low": 2.0, "high": 3.0, "runs": [2.4, 2.6]}},
        "accuracy_over_trl": {"april": {"mean": -0.003, "low": -0.009, "high": 0.002, "runs": [-0.003, -0.003]}},
    }
    page = figures_page([{"benchmark": "grpo", "command": "april bench grpo", "machine": MACHINE, "cases": [case]}])
    assert "| 3m, even, 4 steps | april | 2.4, 2.6 | 2.50 (2.00 to 3.00) | -0.3 (-0.9 to +0.2) |" in page
