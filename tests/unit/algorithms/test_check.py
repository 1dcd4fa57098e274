"""What `check` refuses: each time both keys and a way out, and the same algorithm passes once one of the keys is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from april.algorithms.atoms import SLOTS
from april.algorithms.check import RunFacts, check, remarks
from april.algorithms.spec import AlgorithmConfig
from april.core.errors import RecipeError

PLENTY = RunFacts(8, has_reference=True, records_entropy=True, together="query")
STALE = replace(PLENTY, stale_tokens=True)
PLAIN = {"surrogate": "plain", "bounds": False}
PAIRS = {"surrogate": "none", "bounds": False, "objectives": {"simpo": {}}}
BEHAVIOUR = {"type": "token", "anchor": "behaviour"}


def config(data: dict[str, Any]) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(data)


CASES: dict[str, tuple[dict[str, Any], RunFacts, tuple[str, str], dict[str, Any] | RunFacts]] = {
    # name: (algorithm, run, both keys, what is changed so that it passes)
    "no reference": (
        {"penalties": {"k3": {}}}, replace(PLENTY, has_reference=False), ("penalties.k3", "model.reference"), PLENTY
    ),
    "no entropy": (
        {"adjust": ["entropy_scale"]}, replace(PLENTY, records_entropy=False), ("adjust[0]", "sampling.entropy"), PLENTY
    ),
    "no value model": (
        {"advantage": "gae"}, PLENTY, ("algorithm.advantage", "algorithm.objectives"), {"objectives": {"value": {}}}
    ),
    "no atom provides the score": (
        {"surrogate": "hapo"}, PLENTY, ("algorithm.surrogate", "'normalised_entropy'"), {"adjust": ["normalised_entropy"]}
    ),
    "no greedy members": (
        {"advantage": {"type": "reward_to_go", "baseline": "baseline"}}, PLENTY, ("algorithm.advantage", "batch.greedy_members"),
        replace(PLENTY, greedy_members=1),
    ),
    "idle greedy members": (
        {}, replace(PLENTY, greedy_members=1), ("batch.greedy_members", "algorithm.advantage"),
        {"advantage": {"type": "reward_to_go", "baseline": "baseline"}},
    ),
    "token rewards that nobody reads": (
        {"reward": [{"type": "reference_kl", "level": "token"}]}, PLENTY, ("algorithm.reward[0]", "algorithm.advantage"),
        {"advantage": "reward_to_go"},
    ),
    "a reward beside what is solved": (
        {"reward": ["flaw_penalty"], "advantage": "pass_at_k"}, PLENTY, ("algorithm.reward[0]", "algorithm.advantage"),
        {"advantage": "group"},
    ),
    "a reward beside its parts": (
        {"reward": ["cost_discount"], "advantage": {"type": "decoupled", "parts": {"format": 1.0}}}, PLENTY,
        ("algorithm.reward[0]", "algorithm.advantage"), {"adjust": ["budget_gap"]},
    ),
    "a score that nobody reads": (
        {"adjust": ["normalised_entropy"]}, PLENTY, ("algorithm.adjust[0]", "algorithm.surrogate"), {"surrogate": "hapo"}
    ),
    "values that nobody reads": (
        {"objectives": {"value": {}}}, PLENTY, ("algorithm.objectives.value", "algorithm.advantage"), {"advantage": "gae"}
    ),
    "nothing to correct": (
        {"weights": {"tis": {}}}, replace(PLENTY, interpolates=True), ("algorithm.weights.tis", "training.proximal"),
        replace(STALE, interpolates=True),
    ),
    "stale": ({}, STALE, ("algorithm.weights", "schedule.max_lag_steps"), {"weights": {"tis": {}}}),
    "a veto corrects nothing": ({"weights": {"veto": {}}}, STALE, ("weights", "max_lag"), {"weights": {"veto": {}, "mask": {}}}),
    "a mask of failures corrects nothing": (
        {"weights": {"opsm": {}}}, STALE, ("weights", "max_lag"), {"weights": {"opsm": {}}, "ratio": BEHAVIOUR}
    ),
    "stale on purpose": ({"weights": {"clip_cov": {}}}, STALE, ("weights", "uncorrected"), {"weights": {"uncorrected": {}}}),
    "an anchor that nobody reads": ({**PLAIN, "ratio": BEHAVIOUR}, STALE, ("algorithm.ratio", "algorithm.surrogate"),
                                    {"ratio": "token", "weights": {"tis": {}}}),
    "a mask around the sampler corrects nothing": (
        {"surrogate": "dppo", "bounds": False}, STALE, ("algorithm.weights", "max_lag"), {"ratio": BEHAVIOUR}
    ),
    "a soft gate beside a weight": (
        {"surrogate": "soft_gate", "bounds": False, "weights": {"tis": {}}}, STALE, ("algorithm.surrogate", "weights.tis"),
        {"ratio": BEHAVIOUR, "weights": {}},
    ),
    "a soft gate beside a weight for numerics": (
        {"surrogate": "soft_gate", "bounds": False, "weights": {"tis": {}}}, STALE, ("algorithm.surrogate", "weights.tis"), PLENTY
    ),
    "a window around ratios of tokens": (
        {"surrogate": "vespo", "bounds": False}, PLENTY, ("algorithm.ratio", "algorithm.surrogate"),
        {"ratio": {"type": "sequence", "reduce": "sum"}},
    ),
    "a window around the mean ratio": (
        {"surrogate": "vespo", "bounds": False, "ratio": "sequence"}, PLENTY, ("algorithm.ratio", "algorithm.surrogate"),
        {"ratio": {"type": "sequence", "reduce": "sum"}},
    ),
    "corrected twice": (
        {"ratio": BEHAVIOUR, "weights": {"tis": {}}}, STALE, ("algorithm.ratio.anchor", "algorithm.weights.tis"), {"weights": {}}
    ),
    "masked and corrected once": (
        {"ratio": BEHAVIOUR, "weights": {"mask": {}}}, STALE, ("algorithm.ratio.anchor", "algorithm.weights.mask"),
        {"weights": {"mask": {"keep": "one"}}},
    ),
    "uncorrected and corrected": (
        {"weights": {"uncorrected": {}, "tis": {}}}, STALE, ("algorithm.weights.uncorrected", "algorithm.weights.tis"),
        {"weights": {"tis": {}}},
    ),
    "one sample": ({}, replace(PLENTY, group_size=1), ("algorithm.advantage", "batch.group_size"), PLENTY),
    "one sample, reward instead": (
        {"advantage": "leave_one_out"}, replace(PLENTY, group_size=1), ("algorithm.advantage", "batch.group_size"),
        {"advantage": {"type": "leave_one_out", "singleton": "raw"}},
    ),
    "a filter that keeps nothing": (
        {"filter": ["zero_variance"], "advantage": "reward_to_go"}, replace(PLENTY, group_size=1),
        ("algorithm.filter[0]", "batch.group_size"), {"filter": []},
    ),
    "more draws than samples": (
        {"advantage": {"type": "pass_at_k", "k": 16}}, PLENTY, ("algorithm.advantage", "batch.group_size"),
        replace(PLENTY, group_size=16),
    ),
    "no pair": (
        {**PAIRS, "advantage": "reward_to_go"}, replace(PLENTY, group_size=1), ("objectives.simpo", "group_size"), PLENTY
    ),
    "a composer leaves one": (
        {"compose": [{"type": "resample_on_correct", "keep_fraction": 0.1}]}, PLENTY, ("advantage", "algorithm.compose[0]"),
        {"compose": [{"type": "resample_on_correct", "keep_fraction": 0.3}]},
    ),
    "sequence ratio": (
        {"ratio": "sequence", "aggregate": "token_mean"}, PLENTY, ("algorithm.ratio", "algorithm.aggregate"),
        {"aggregate": "sequence_mean"},
    ),
    "geometric mean": (
        {"surrogate": "geometric_mean", "aggregate": "token_mean"}, PLENTY, ("algorithm.surrogate", "algorithm.aggregate"),
        {"aggregate": "sequence_sum"},
    ),
    "sequence ratio of a fixed length": (
        {"ratio": "sequence", "aggregate": {"type": "fixed_length", "constant": 9}}, PLENTY, ("ratio", "aggregate"),
        {"ratio": "sequence", "surrogate": "cispo", "weights": {}},
    ),
    "shuffled wordings": (
        {"reward": ["group_similarity"]}, replace(PLENTY, together=None), ("algorithm.reward[0].query", "batch.together"), PLENTY
    ),
    "shuffled budgets": (
        {"advantage": {"type": "query_group", "query": "item.question"}}, PLENTY, ("algorithm.advantage.query", "batch.together"),
        replace(PLENTY, together="question"),
    ),
    "shuffled predictions": (
        {"reward": ["self_prediction"]}, replace(PLENTY, together="other"), ("reward[0].query", "batch.together"), PLENTY
    ),
    "idle bounds": ({"surrogate": "plain"}, PLENTY, ("algorithm.bounds", "algorithm.surrogate"), {"bounds": False}),
    "missing bounds": ({"bounds": False}, PLENTY, ("algorithm.surrogate", "algorithm.bounds"), {"bounds": "constant"}),
    "missing bounds, dual clip": (
        {"bounds": False}, PLENTY, ("surrogate", "bounds"), {"surrogate": {"type": "clip", "dual_clip": 3.0}}
    ),
    "bounds of another ratio": (
        {"bounds": "second_moment"}, PLENTY, ("algorithm.bounds", "algorithm.ratio.anchor"), {"ratio": BEHAVIOUR}
    ),
    "shifted bounds of another ratio": ({"bounds": "shifted"}, PLENTY, ("bounds", "ratio.anchor"), {"ratio": BEHAVIOUR}),
    "idle ratio": (
        {**PLAIN, "ratio": "sequence"}, PLENTY, ("algorithm.ratio", "algorithm.surrogate"), {"surrogate": "importance"}
    ),
    "idle gradient of the ratio": (
        {"ratio": {"type": "sequence", "gradient": "sequence"}, "surrogate": "cispo"}, PLENTY, ("ratio.gradient", "surrogate"),
        {"ratio": "sequence"},
    ),
    "idle weights": ({**PAIRS, "weights": {"tis": {}}}, PLENTY, ("algorithm.weights", "algorithm.surrogate"), {"weights": {}}),
    "nothing trains": ({"surrogate": "none", "bounds": False}, PLENTY, ("surrogate", "objectives"), {"objectives": {"nll": {}}}),
    "several steps of a plain gradient": (
        PLAIN, replace(PLENTY, num_optimizer_steps=2), ("algorithm.surrogate", "training.num_optimizer_steps"), PLENTY
    ),
    "several passes of a plain gradient": (PLAIN, replace(PLENTY, num_epochs=3), ("surrogate", "training.num_epochs"), PLENTY),
    "an update of several steps of a plain gradient": (
        {**PLAIN, "update": "slow_fast"}, PLENTY, ("algorithm.surrogate", "algorithm.update"), {"update": "plain"}
    ),
    "passes decided twice": (
        {"update": "bandit_epochs"}, replace(PLENTY, num_epochs=2), ("algorithm.update", "training.num_epochs"), PLENTY
    ),
    "length penalty out of reach": (
        {"reward": [{"type": "overlong", "max_tokens": 900, "buffer_tokens": 100}]}, replace(PLENTY, max_new_tokens=512),
        ("algorithm.reward[0].max_tokens", "sampling.max_new_tokens"), replace(PLENTY, max_new_tokens=850),
    ),
    "greedy": ({}, replace(PLENTY, temperature=0.0), ("sampling.temperature", "algorithm"), PLENTY),
    "truncated sampling": ({}, replace(PLENTY, top_p=0.9), ("sampling.top_p", "sampling.top_k"), PLENTY),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_work_is_refused_with_both_keys_and_a_way_out(name: str) -> None:
    data, run, keys, repair = CASES[name]
    with pytest.raises(RecipeError) as caught:
        check(config(data), run)
    text = str(caught.value)
    assert all(key in text for key in keys) and caught.value.hint
    changed = (data, repair) if isinstance(repair, RunFacts) else ({**data, **repair}, run)
    check(config(changed[0]), changed[1])


IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("eps", {"advantage": {"type": "group", "std": "none", "eps": 0.1}}, "std"),
    ("low", {"weights": {"reject": {"statistic": "k3", "low": 0.9}}}, "statistic"),
    ("segment_tokens", {"advantage": {"type": "tree_gain", "segment_tokens": 9, "delimiter_ids": [3]}}, "delimiter_ids"),
    ("temperature", {"advantage": {"type": "tree_depthwise", "temperature": 2.0}}, "fusion"),
    ("lam", {"advantage": {"type": "polychromic", "lam": 0.5}}, "window_tokens"),
    ("importance_gradient", {"penalties": {"k3": {"importance_gradient": False}}}, "importance"),
    ("noise", {"update": {"type": "bandit_epochs", "noise": 0.2}}, "rule"),
]


@pytest.mark.parametrize(("option", "data", "cause"), IDLE, ids=[option for option, _, _ in IDLE])
def test_an_option_without_effect_is_refused_unless_it_is_the_default(option: str, data: dict[str, Any], cause: str) -> None:
    with pytest.raises(RecipeError, match="has no effect") as caught:
        check(config(data), PLENTY)
    assert f".{option}, " in str(caught.value) and f".{cause}" in str(caught.value)
    atoms = [atom for _, atom in config(data).atoms() if option in type(atom).model_fields]
    assert any(option in atom.idle_options for atom in atoms)
    without = {k: {n: v for n, v in t.items() if n != option} if "type" in t else {n: {m: w for m, w in v.items() if m != option}
               for n, v in t.items()} for k, t in data.items()}  # fmt: skip
    check(config(without), PLENTY)


def test_every_idle_option_is_an_option_and_has_a_cause() -> None:
    required: dict[str, Any] = {"max_tokens": 2, "buffer_tokens": 1, "constant": 3, "weights": {"part.a": 1.0}}
    required |= {"parts": {"a": 1.0}, "items": {"a": 1.0}}
    seen = 0
    for atoms in SLOTS.values():
        for entry in atoms.values():
            fields = entry.config.model_fields
            atom = entry.config(**{key: value for key, value in required.items() if key in fields})
            assert set(atom.idle_options) | set(atom.idle_options.values()) <= set(fields)
            assert atom.min_group_size >= 1
            seen += len(atom.idle_options)
    assert seen > 5


def test_an_option_that_a_type_does_not_have_is_unknown() -> None:
    with pytest.raises(RecipeError, match="unknown key"):
        config({"surrogate": {"type": "plain", "dual_clip": 3.0}, "bounds": False})
    check(config({"surrogate": {"type": "clip", "dual_clip": 3.0}}), PLENTY)


def test_remarks_say_which_bounds_never_act() -> None:
    assert len(remarks(config({}), PLENTY)) == 1 and "num_optimizer_steps = 2" in remarks(config({}), PLENTY)[0]
    for run in (replace(PLENTY, num_optimizer_steps=2), replace(PLENTY, num_epochs=2), replace(PLENTY, interpolates=True)):
        assert remarks(config({}), run) == []
    assert remarks(config({"ratio": BEHAVIOUR}), PLENTY) == [] and remarks(config({"update": "slow_fast"}), PLENTY) == []
    held = {"bounds": False, "surrogate": "importance", "penalties": {"kl_cov": {}, "k3": {}}}
    assert remarks(config(held), PLENTY) == ["algorithm.penalties.kl_cov is 0 with one optimiser step a batch"]
