"""Presets whose rewards come from programs and queries that are run, on what the packaged rewards report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from shape_cases import group_of

from april.algorithms.losses.compose import Algorithm, credit
from april.algorithms.spec import AlgorithmConfig
from april.config.load import read_preset
from april.core.group import Batch, Group, Reward
from april.core.ids import SampleId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.rewards.build import build_reward
from april.rewards.judge import judge
from april.training.batch import assemble

LOOP = "def f(x):\n    total = 0\n    for _ in range({}):\n        total += 1\n    return 2 * x"
WRONG = "def f(x): return x"


def code(source: str) -> str:
    return f"```python\n{source}\n```"


def judged(spec: Any, texts: list[str], item: Mapping[str, Any]) -> Group:
    """A group of these responses."""
    sample = Sample(SampleId(0, 0, "p", 0), Prompt("p", [1], "", item), SamplingSpec(1), stop="eos")
    outcomes = [judge(build_reward(spec), text, sample, 60.0) for text in texts]
    assert all(isinstance(outcome, Reward) for outcome in outcomes), outcomes
    return group_of(outcomes, item=item)


def column(preset: str, name: str, group: Group) -> list[float]:
    """A column of the batch with the preset's credit, one number for each sample."""
    algorithm = Algorithm.of(AlgorithmConfig.model_validate(read_preset(preset)[0]))
    kept = (group,)
    for compose in algorithm.compose:
        kept = tuple(compose(kept))
    data = assemble(Batch(0, 0, (group,)), kept, algorithm.config.requires)
    tokens = credit(algorithm, data.tokens.with_columns(reference=data.tokens["behaviour"]))
    return tokens.layout.first(tokens[name]).tolist()


def test_acecode_ranks_programs_by_speed_and_by_how_far_they_came() -> None:
    item = {"tests": ["assert f(2) == 4"], "reference_time_s": 1e-4}
    texts = [code(LOOP.format(1)), code(LOOP.format(3_000_000)), code(WRONG)]
    fast, slow, fails = column("acecode", "reward", judged({"type": "program", "timeout_s": 30.0}, texts, item))
    assert fast > 0.51 > slow > 0.5 and fails == -0.3
    stopped = judged("program", [code("def f(x): return y"), code("def f(x) return x"), "no program"], item)
    assert column("acecode", "reward", stopped) == [-0.6, -1.0, -1.0]


def test_afterburner_compares_with_the_program_to_improve() -> None:
    item = {"tests": ["assert f(2) == 4"], "baseline_time_s": 5.0, "baseline_passes": 1}
    group = judged({"type": "program", "timeout_s": 30.0}, [code(LOOP.format(1)), code(WRONG)], item)
    better, broke = column("afterburner", "reward", group)
    assert better == pytest.approx(0.5 * (0.5 + 0.5 * 0.7616) + 0.2, abs=1e-3) and broke == pytest.approx(-0.3)


def test_econprover_pairs_direct_and_reasoned_programs() -> None:
    spec = {"type": "patterns", "reward": "program", "patterns": {"reasoning": "<think>"}}
    texts = ["<think>" + code(LOOP.format(1)), code(WRONG), code(LOOP.format(1)), "<think>" + code(WRONG)]
    group = judged(spec, texts, {"tests": ["assert f(2) == 4"]})
    assert column("econprover", "reward", group) == [0.0, 1.0], "of two that pass the direct one is preferred"
    unsolved = judged(spec, [texts[0], texts[1]], {"tests": ["assert f(2) == 4"]})
    assert column("econprover", "reward", unsolved) == [1.0, 0.0], "reasoning, where only it passes"


def test_reex_sql_weighs_what_the_query_did() -> None:
    item = {"schema": "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 2), (3, 4);", "answer": "SELECT a FROM t"}
    texts = [
        "<intermediate_sql>SELECT * FROM t</intermediate_sql><final_sql>select a from t</final_sql>",
        "<final_sql>SELECT b FROM t</final_sql> is the answer",
        "<final_sql>SELECT t.a FROM t</final_sql>",
    ]
    assert column("reex_sql", "reward", judged("sql", texts, item)) == [9.0, 0.5, 6.0]
