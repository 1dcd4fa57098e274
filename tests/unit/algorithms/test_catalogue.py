"""The catalogue is complete: every atom has a source, every golden case is run or said to be outside, every preset has a row."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from april.algorithms import catalogue
from april.algorithms.atoms import SLOTS
from april.algorithms.spec import AlgorithmConfig
from april.config.load import read_preset, recipe_names
from tests.golden import golden_helpers

for found in sorted(Path(golden_helpers.__file__).parent.glob("runners_*.py")):
    importlib.import_module(f"tests.golden.{found.stem}")

BUILT_IN = [(slot, name) for slot, atoms in SLOTS.items() for name, entry in atoms.items() if isinstance(entry.function, str)]
PRESETS = recipe_names("algorithm")
ORDER = ["filter", "compose", "reward", "advantage", "adjust", "ratio", "bounds", "surrogate", "aggregate", "update", "weights",
         "penalties", "objectives", "recipe"]  # fmt: skip
SOURCE = re.compile(r"arXiv \d{4}\.\d{5}|[A-Z]\w+(?: et al\.)? (?:19|20)\d\d")
absent = pytest.mark.skipif(not golden_helpers.PATH.exists(), reason="the golden cases are not on this machine")


def cases() -> list[dict[str, Any]]:
    return json.loads(golden_helpers.PATH.read_text())["cases"]  # type: ignore[no-any-return]


def unexplained(names: set[str], run: set[str], outside: set[str]) -> set[str]:
    """Cases that are neither run nor said to be outside, or both."""
    return (names - run - outside) | (run & outside) | ((run | outside) - names)


@absent
def test_every_golden_case_is_run_or_outside_with_a_reason() -> None:
    names, run = {case["name"] for case in cases()}, set(golden_helpers.RUNNERS)
    outside = {name for other in catalogue.OUTSIDE for name in other.golden}
    assert unexplained(names, run, outside) == set() and len(names) > 90
    assert all("continuous control" in other.reason for other in catalogue.OUTSIDE) and len(outside) == 3
    assert unexplained(names, run - {"kl_estimators"}, outside) == {"kl_estimators"}, "a case that nothing runs would be seen"


@absent
def test_every_golden_case_is_named_in_the_catalogue_and_no_other() -> None:
    atoms = {name for method in catalogue.methods() if method.info for name in method.info.golden}
    others = {name for row in (*catalogue.ELSEWHERE, *catalogue.OUTSIDE) for name in row.golden}
    assert atoms | others == {case["name"] for case in cases()}
    assert not {name for row in catalogue.OUTSIDE for name in row.golden} & (atoms | set(golden_helpers.RUNNERS))


@absent
def test_only_what_has_the_numbers_of_a_public_implementation_is_called_sure() -> None:
    matched = {case["name"] for case in cases() if case["status"] == "matches reference"}
    methods = [(method.name, method.info) for method in catalogue.methods() if method.info is not None]
    sure = [(name, info.golden) for name, info in methods if info.certainty == "A"]
    sure += [(row.name, row.golden) for row in catalogue.ELSEWHERE if row.certainty == "A" and row.golden]
    assert len(sure) > 50 and [name for name, golden in sure if not matched & set(golden)] == []


def test_what_nothing_calls_is_a_formula_only() -> None:
    package = Path(catalogue.__file__).parents[1]
    sources = [path.read_text() for path in package.rglob("*.py") if path.name not in ("allocation.py", "catalogue.py")]
    found = {row.where: re.search(r"`april\.selection\.allocation\.(\w+)`", row.where) for row in catalogue.ELSEWHERE}
    named = {where: match[1] for where, match in found.items() if match is not None}
    assert len(named) >= 4
    for where, name in named.items():
        assert any(re.search(rf"\b{name}\b", source) for source in sources) is not where.startswith("formula only"), where


@pytest.mark.parametrize(("slot", "name"), BUILT_IN)
def test_every_built_in_atom_has_a_source_and_a_formula(slot: str, name: str) -> None:
    info = SLOTS[slot][name].config.info
    assert info is not None and info.paper and info.formula and info.certainty in catalogue.CERTAINTIES
    plain = {"plain", "none", "abs", "importance", "tis_normalised", "mask", "veto", "reject", "tis", "constant", "uncorrected"}
    assert SOURCE.search(info.paper) or name in plain, "a source that can be found"


def test_every_atom_has_a_row_with_its_presets() -> None:
    rows = {(row.slot, row.name): row for row in catalogue.methods()}
    assert set(BUILT_IN) <= set(rows)
    assert rows["surrogate", "soft_gate"].presets == ("sapo",) and "grpo" in rows["weights", "tis"].presets
    assert (
        rows["advantage", "group"].defaults["eps"] == 1e-6
        and rows["aggregate", "fixed_length"].defaults["constant"] == "required"
    )
    assert rows["penalties", "kl_convex"].reads == ("behaviour", "reference", "step")


def test_every_preset_has_a_row() -> None:
    rows = {row.name: row for row in catalogue.presets()}
    assert sorted(rows) == PRESETS and all(row.own for row in rows.values() if row.name != "grpo")
    assert rows["ppo"].wants == () and rows["remix"].wants == ("reference",) and rows["aepo"].wants == ("entropy",)
    assert rows["cispo"].own == ("ratio token", "bounds constant", "surrogate cispo", "aggregate token_mean")
    assert rows["mis"].summary.endswith("do not train"), "the sentence does not end at et al."


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_one_form(name: str) -> None:
    text = catalogue.find_recipe(name, folder="algorithm").read_text(encoding="utf-8")
    head, *_ = lines = text.splitlines()
    assert head.startswith("# ") and SOURCE.search(head), "a sentence with its source"
    assert max(map(len, lines)) <= 130 and len([line for line in lines if line and not line.startswith("#")]) <= 16
    tree, others = read_preset(name)
    keys = [key for key in [*tree, *(["recipe"] if others else [])] if not isinstance(tree.get(key), list) or key != "reward"]
    assert keys == sorted(keys, key=ORDER.index), "slots in the order in which they work"
    config = AlgorithmConfig.model_validate(tree)
    if config.surrogate.type != "none":
        assert {"advantage", "bounds", "surrogate", "aggregate"} <= set(tree)


def test_no_two_presets_are_the_same() -> None:
    seen = {name: AlgorithmConfig.model_validate(read_preset(name)[0]).model_dump_json() for name in PRESETS}
    assert len(set(seen.values())) == len(PRESETS) > 70


def test_many_names_are_shortened_to_some() -> None:
    assert catalogue.shortened(["b", "grpo", "a"]) == "grpo, a, b"
    assert catalogue.shortened([f"p{i}" for i in range(9)] + ["grpo"]) == "grpo, p0 and 8 others"


def test_the_generated_page_has_every_row() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "algorithms.md").read_text(encoding="utf-8")
    sections = dict(zip(*[iter(re.split(r"^## (\w+)\n", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert [(slot, name) for slot, name in BUILT_IN if f"\n| `{name}` |" not in sections[slot]] == []
    assert [name for name in PRESETS if f"\n| `{name}` |" not in sections["presets"]] == []
    assert all(f"| {other.name} |" in sections["outside"] for other in catalogue.OUTSIDE)
    assert "| `sapo` |" not in sections["surrogate"]
