"""The documentation says what is: links lead somewhere, names exist, commands parse, generated pages are current."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from docs_helpers import DOCS, FENCE, LINK, PAGES, ROOT, blocks, every_page, name_of, prose, section

from april import registry
from april.algorithms.atoms import Atom
from april.algorithms.spec import SLOTS  # with the built-in atoms registered
from april.config.comparison import find_comparison
from april.config.load import find_recipe, recipe_names
from april.config.recipe import Recipe
from april.config.resolve import resolve
from april.config.schema import Config
from april.core.errors import AprilError

HAND_WRITTEN = [page for page in PAGES if page.parent.name != "reference"]


# -- links ---------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    broken = []
    for link in LINK.findall(prose(text)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@every_page
def test_every_relative_link_resolves(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_every_page_is_linked_from_the_index() -> None:
    linked = {
        (DOCS / link.partition("#")[0]).resolve() for link in LINK.findall((DOCS / "README.md").read_text(encoding="utf-8"))
    }
    assert [name_of(page) for page in PAGES if page not in linked and page.name != "README.md"] == []


def test_a_broken_link_is_found() -> None:
    text = "[a](glossary.md) [b](glosary.md) [c](glossary.md#nowhere) [d](glossary.md#log-probs)"
    assert broken_links(DOCS / "overview.md", text) == ["glosary.md", "glossary.md#nowhere"]


# -- names in back-ticks -------------------------------------------------------------------------------------------------


@lru_cache
def key_paths() -> frozenset[str]:
    """Every dotted key that a recipe may have, with any component in its place."""
    paths = set()
    for name, field in Recipe.model_fields.items():
        paths.add(name)
        kind = "task" if name == "evaluation_task" else name
        models = [registry.config_class(kind, known, kind) for known in registry.names(kind)] if kind in registry.KINDS else []
        sections = {"algorithm": "april.algorithms.spec:AlgorithmConfig", "training": "april.training.config:TrainerConfig"}
        models += [registry.load(sections[name])] if name in sections else []
        models += [field.annotation] if hasattr(field.annotation, "model_fields") else []
        paths |= {f"{name}.{key}" for model in models for key in nested_keys(model)}
    paths |= {"algorithm.preset", *(f"algorithm.{slot}.{name}" for slot, atoms in SLOTS.items() for name in atoms)}
    return frozenset(paths)


def nested_keys(model: type[Config]) -> set[str]:
    """The keys of a section, and those of the sections inside it with their dots."""
    keys = set(model.model_fields)
    for name, field in model.model_fields.items():
        inner = [field.annotation, *typing.get_args(field.annotation)]
        keys |= {f"{name}.{key}" for part in inner if hasattr(part, "model_fields") for key in nested_keys(part)}
    return keys


def wrong_names(text: str) -> list[str]:
    """Paths, import names and recipe keys in back-ticks that do not exist."""
    wrong = []
    for quoted in re.findall(r"`([^`\n]+)`", prose(text)):
        first = re.split(r"[ =(]", quoted)[0]
        head = first.partition(".")[0]
        if re.match(r"^(april|tests|docs|examples|\.ci)/", first):
            found = (ROOT / first).exists()
        elif re.fullmatch(r"april(\.\w+)+", first):
            found = importable(first)
        elif re.fullmatch(r"\w+(\.\w+)+", first) and head in Recipe.model_fields:
            found = first in key_paths()
        else:
            continue
        if not found:
            wrong.append(quoted)
    return wrong


def importable(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    if name in {f"april.{kind}" for kind in registry.KINDS}:
        return True  # a group of entry points
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(__import__(module, fromlist=[attribute]), attribute)
    except ImportError:
        return False


@every_page
def test_names_in_back_ticks_exist(page: Path) -> None:
    assert wrong_names(page.read_text(encoding="utf-8")) == []


def test_a_wrong_name_is_found() -> None:
    right = "`april/core/ids.py` `schedule.over_provision=2` `april.train` `algorithm.weights.tis`"
    wrong = "`april/core/idz.py` `schedule.over_provison` `april.trane()` `algorithm.weights.tiss`"
    assert wrong_names(right) == []
    assert wrong_names(wrong) == re.findall(r"`(.+?)`", wrong)


# -- commands ------------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(mark of the block, arguments) of each `$ april ...` line."""
    for mark, body in blocks(text, "console"):
        for line in body.splitlines():
            if line.startswith("$ april "):
                yield mark, shlex.split(line)[2:]


def check_command(arguments: list[str], mark: str = "") -> None:
    """Parse a command line; resolve its recipe and overrides, unless it names files that only the reader has."""
    import typer

    group = typer.main.get_command(_app())
    name, *rest = arguments
    context = group.commands[name].make_context(name, list(rest))  # type: ignore[attr-defined]
    recipe, overrides = context.params.get("recipe"), context.params.get("overrides") or []
    if recipe is None or mark == "sketch" or context.params.get("resume"):
        return
    comparison = find_comparison(recipe) if name == "compare" else None
    if comparison is not None:
        resolve(comparison.recipe, overrides=[*comparison.overrides, *overrides])
    elif mark != "fails":
        resolve(recipe, overrides=overrides) if name != "warm-start" else find_recipe(recipe, folder="warm_start")


def _app() -> Any:
    from april.cli.main import app

    return app


@every_page
def test_commands_parse(page: Path) -> None:
    found = list(commands(page.read_text(encoding="utf-8")))
    for mark, arguments in found:
        check_command(arguments, mark)
    assert len(found) == page.read_text(encoding="utf-8").count("\n$ april ")


@pytest.mark.parametrize(
    "line", ["train quickstart --rezume", "trane quickstart", "train quickstart schedule.over=2", "train quickstrat"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"No such option|trane|unknown key|no such recipe"):
        check_command(shlex.split(line))
    check_command(["train", "quickstart", "schedule.over_provision=2"])
    assert "resume" in inspect.signature(sys.modules["april.cli.main"].train).parameters


def test_commands_that_must_fail_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from april.run.build import build

    monkeypatch.chdir(tmp_path)
    failing = [arguments for mark, arguments in commands((DOCS / "errors.md").read_text(encoding="utf-8")) if mark == "fails"]
    assert len(failing) >= 5
    for arguments in failing:
        overrides = [argument for argument in arguments[2:] if "=" in argument]
        with pytest.raises(AprilError) as caught:
            build(resolve(arguments[1], overrides=overrides))
        assert "\n  " in str(caught.value)


# -- generated pages and form --------------------------------------------------------------------------------------------


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCS / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_generated_pages_are_current() -> None:
    done = generate("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_generated_pages_name_everything() -> None:
    text = (DOCS / "reference" / "components.md").read_text(encoding="utf-8")
    known: Mapping[str, Any] = {**registry.KINDS, **{f"algorithm.{slot}": table for slot, table in SLOTS.items()}}
    built_in = {(kind, name) for kind, table in known.items() for name, entry in table.items() if _built_in(entry)}
    missing = [(kind, name) for kind, name in built_in if f"### `{name}`" not in section(text, kind)]
    assert missing == [] and len(built_in) > 20
    assert all(f"### `{name}`" in text for name in recipe_names("algorithm"))


def _built_in(entry: Any) -> bool:
    if isinstance(entry.config, type) and issubclass(entry.config, Atom):
        return isinstance(entry.function, str)
    return isinstance(entry.config, str)


def test_a_page_that_is_not_current_is_found(tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.REFERENCE = tmp_path
    assert module.main(["--check"]) == 1
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0
    (tmp_path / "recipe.md").write_text("old")
    assert module.main(["--check"]) == 1


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name_of)
def test_pages_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert lines[0].startswith("# ")
