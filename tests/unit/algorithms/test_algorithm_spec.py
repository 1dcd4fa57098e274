"""Configs: parsing, presets, one's own atoms, and what `check` refuses."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from april.algorithms.atoms import COLUMNS, SLOTS, Atom, Entry, function_of, register
from april.algorithms.check import RunFacts, check
from april.algorithms.filters import first_reason, zero_variance
from april.algorithms.losses.compose import Algorithm
from april.algorithms.spec import AlgorithmConfig
from april.core.errors import RecipeError
from april.core.group import Failure, Group, Outcome, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec

PRESETS = ("grpo", "dr_grpo", "rloo", "dapo")
FACTS = RunFacts(group_size=8, stale_tokens=True)


def preset(name: str) -> dict[str, object]:
    text = importlib.resources.files("april").joinpath("recipes", "algorithm", f"{name}.toml").read_text()
    return tomllib.loads(text)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_build_check_and_round_trip(name: str) -> None:
    config = AlgorithmConfig.model_validate(preset(name))
    check(config, FACTS)
    assert AlgorithmConfig.model_validate(config.model_dump()) == config
    assert Algorithm.of(config).terms == ()
    with pytest.raises(RecipeError, match="siblings"):
        check(config, RunFacts(group_size=1))


def test_presets_are_what_their_papers_say() -> None:
    configs = {name: AlgorithmConfig.model_validate(preset(name)) for name in PRESETS}
    assert {name: config.aggregate.type for name, config in configs.items()} == {
        "grpo": "sequence_mean", "dr_grpo": "fixed_length", "rloo": "sequence_sum", "dapo": "token_mean",
    }  # fmt: skip
    assert configs["dapo"].bounds is not None and configs["dapo"].bounds.options() == {"low": 0.8, "high": 1.28}
    assert [atom.type for atom in configs["dapo"].filter] == ["zero_variance"] and configs["rloo"].bounds is None
    assert configs["dr_grpo"].advantage.options()["std"] == "none"


def test_parts_are_taken_away_with_false_and_named_by_default_type() -> None:
    config = AlgorithmConfig.model_validate({"weights": {"tis": False, "mask": True, "second": {"type": "tis", "cap": 3}}})
    assert {name: atom.type for name, atom in config.weights.items()} == {"mask": "mask", "second": "tis"}
    assert config.requires >= {"behaviour", "proximal", "reward"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"surrogate": "clop"}, "did you mean 'clip'"),
        ({"weights": {"tis": {"cpa": 2}}}, "algorithm.weights.tis.cpa"),
        ({"aggregate": "fixed_length"}, "algorithm.aggregate.constant"),
        ({"bounds": {"low": 1.5, "type": "constant"}}, "algorithm.bounds.low"),
        ({"adjust": "whiten"}, "array of tables"),
        ({"weights": ["tis"]}, "by name"),
        ({"advantage": 3}, "table with a type"),
        ({"compose": ["pairs"]}, "algorithm.compose[0].type"),
        ({"reward": [{"type": "overlong", "max_tokens": 5, "buffer_tokens": 9}]}, "buffer_tokens, max_tokens"),
    ],
)
def test_bad_recipes_say_where_and_what_next(data: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        AlgorithmConfig.model_validate(data)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "facts", "words"),
    [
        ({}, RunFacts(8, stale_tokens=True), ("algorithm.weights", "schedule")),
        ({"advantage": "leave_one_out"}, RunFacts(1), ("algorithm.advantage", "group_size")),
        ({"penalties": {"k3": {}}}, RunFacts(8), ("algorithm.penalties.k3", "model.reference")),
        ({"surrogate": "plain"}, RunFacts(8), ("algorithm.bounds", "algorithm.surrogate")),
        (
            {"surrogate": "plain", "bounds": False},
            RunFacts(8, num_optimizer_steps=2),
            ("algorithm.surrogate", "num_optimizer_steps"),
        ),
        ({"bounds": False}, RunFacts(8), ("algorithm.surrogate", "algorithm.bounds")),
        ({"ratio": "sequence", "aggregate": "token_mean"}, RunFacts(8), ("algorithm.ratio", "algorithm.aggregate")),
        ({}, RunFacts(8, temperature=0.0), ("temperature", "algorithm")),
        ({}, RunFacts(8, top_p=0.9), ("top_p", "kept set is stored")),
        (
            {"reward": [{"type": "overlong", "max_tokens": 9000, "buffer_tokens": 100}]},
            RunFacts(8, max_new_tokens=512),
            ("algorithm.reward[0].max_tokens", "max_new_tokens"),
        ),
    ],
)
def test_check_names_both_keys(data: dict[str, object], facts: RunFacts, words: tuple[str, str]) -> None:
    config = AlgorithmConfig.model_validate(data)
    with pytest.raises(RecipeError) as error:
        check(config, facts)
    assert all(word in str(error.value) for word in words)


def test_check_passes_what_is_fine() -> None:
    config = AlgorithmConfig.model_validate({"penalties": {"k3": {}}, "ratio": "sequence", "weights": {"mask": {}}})
    check(config, RunFacts(8, stale_tokens=True, has_reference=True))
    assert config.requires <= set(COLUMNS)


def test_every_entry_has_a_docstring_a_config_and_a_function() -> None:
    for slot, entries in SLOTS.items():
        for name, entry in entries.items():
            assert entry.config.__doc__ and entry.config.requires <= set(COLUMNS), f"{slot}.{name}"
            required: dict[str, object] = {"max_tokens": 2, "buffer_tokens": 1, "constant": 3, "weights": {"part.format": 1.0}}
            required |= {"parts": {"a": 1.0}, "items": {"a": 1.0}}
            given = {key: value for key, value in required.items() if key in entry.config.model_fields}
            assert callable(function_of(slot, entry.config(**given))), f"{slot}.{name}"


class Doubled(Atom):
    """Twice the reward."""

    requires = frozenset({"reward"})
    type: Literal["test_doubled"] = "test_doubled"
    factor: float = 2.0


@pytest.fixture
def doubled() -> Iterator[None]:
    register("advantage", "test_doubled", Doubled, lambda tokens, factor: factor * tokens["reward"])
    yield
    del SLOTS["advantage"]["test_doubled"]


@pytest.mark.usefixtures("doubled")
def test_an_atom_of_ones_own() -> None:
    config = AlgorithmConfig.model_validate({"advantage": {"type": "test_doubled", "factor": 3.0}})
    assert Algorithm.of(config).advantage({"reward": torch.ones(2)}).tolist() == [3, 3]
    assert SLOTS["advantage"]["test_doubled"].config is Doubled
    with pytest.raises(RecipeError, match="one name"):
        register("advantage", "test_doubled", Doubled, "elsewhere:function")
    with pytest.raises(RecipeError, match="no such slot"):
        register("advantages", "x", *Entry(Doubled, "a:b"))


def group_of(outcomes: list[Outcome]) -> Group:
    group = GroupId(0, 0, "p")
    prompt = Prompt("p", [1])  # type: ignore[arg-type]
    samples = tuple(Sample(group.member(i), prompt, SamplingSpec(4), stop="eos") for i in range(len(outcomes)))
    return Group(group, samples, tuple(outcomes))


def test_zero_variance_filter_judges_correctness_and_not_shaped_rewards() -> None:
    right, wrong, shaped = Reward(1.0, True), Reward(0.0, False), Reward(0.8, True)
    assert zero_variance(group_of([right, right])) == "all correct"
    assert zero_variance(group_of([wrong, wrong])) == "none correct"
    assert zero_variance(group_of([right, shaped])) == "all correct"
    assert zero_variance(group_of([right, shaped]), by="reward") is None
    assert zero_variance(group_of([right, wrong])) is None
    assert zero_variance(group_of([right, Failure("lost")])) == "fewer than two rewarded members"


def test_the_chain_gives_the_first_reason() -> None:
    chain = AlgorithmConfig.model_validate({"filter": [{"type": "zero_variance", "by": "reward"}, "zero_variance"]}).filter
    equal = group_of([Reward(1.0, True), Reward(0.5, True)])
    assert first_reason(chain, equal) == "all correct" and first_reason(chain[:1], equal) is None


def test_configs_and_checks_import_no_torch() -> None:
    code = "import sys, april.algorithms.check, april.algorithms.filters, april.training.config; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
