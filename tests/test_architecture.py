"""The agreements of the design as checks over the source: layers, torch-free packages, words, sizes."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from april.algorithms.atoms import COLUMNS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "april"
LAYERS = [
    {"core"},
    {"config", "observe", "checkpoint", "registry"},
    {"text", "rewards", "environments", "selection", "algorithms", "models"},
    {"engines", "rollout"},
    {"training", "simulate"},
    {"distributed"},
    {"run"},
    {"bench"},
    {"api"},
    {"cli"},
    {"testing", "__main__", ""},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
SIBLINGS_SHARE_A_LAYER = {"config", "registry"}  # one concern in two modules: the registry holds configs, recipes are typed by it
TORCH_FREE_PACKAGES = {"core", "config", "observe", "selection", "rollout", "simulate", "rewards", "checkpoint", "registry"}
TORCH_FREE_MODULES = {
    "april",
    "april.algorithms.spec",
    "april.algorithms.catalogue",
    "april.algorithms.check",
    "april.cli.main",
    "april.engines.base",
    "april.engines.scripted",
    "april.engines.embedded.config",
    "april.training.config",
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
FILES = sorted(PACKAGE.rglob("*.py"))
names_of_files = functools.partial(pytest.mark.parametrize, "path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def part_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere in a tree, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else node.module), node.lineno


def layer_faults(module: str, tree: ast.AST) -> list[str]:
    """Imports that point up, or to a sibling's inside."""
    own, faults = part_of(module), []
    for target, line in imports_of(tree):
        if target.split(".")[0] != "april" or target == "april":
            continue
        other = part_of(target)
        if other == own:
            continue
        if RANK[other] > RANK[own]:
            faults.append(f"line {line}: {own} imports {other}, which is above it")
        elif RANK[other] == RANK[own] and not target.endswith(".base") and not {own, other} <= SIBLINGS_SHARE_A_LAYER:
            faults.append(f"line {line}: {own} imports its sibling's inside, {target}")
    return faults


@names_of_files()
def test_imports_point_down(path: Path) -> None:
    """Imports inside functions count too: laziness saves time, it does not turn a layer round."""
    assert layer_faults(module_of(path), tree_of(path)) == []


def test_the_layer_check_sees_what_it_should() -> None:
    """Negative control."""
    bad = "def f():\n    from april.run.loop import x\nimport april.engines.scripted\nfrom april.engines.base import Engine\n"
    assert [fault.split(":")[0] for fault in layer_faults("april.rollout.x", ast.parse(bad))] == ["line 3", "line 2"]
    assert layer_faults("april.core.x", ast.parse("from april.config.schema import Config")) != []
    assert layer_faults("april.run.x", ast.parse("from april.core.ids import GroupId")) == []
    assert {part_of(module) for module in MODULES} <= set(RANK)


def torch_free_modules() -> list[str]:
    specs = "april.algorithms.specs"
    known = [module for module in MODULES if part_of(module) in TORCH_FREE_PACKAGES or module in TORCH_FREE_MODULES]
    return sorted({*known, *(module for module in MODULES if module == specs or module.startswith(f"{specs}."))})


_BLOCKED_IMPORT = """
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "ray", "vllm"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, "->", error)
from april import registry
for kind in registry.KINDS:
    for name in registry.names(kind):
        try:
            registry.config_class(kind, name, kind)
        except ImportError as error:
            print("config of", kind, name, "->", error)
"""


def imported_without_torch(*modules: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED_IMPORT, *modules], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout + done.stderr


def test_torch_free_packages_and_all_configs_import_without_torch() -> None:
    modules = torch_free_modules()
    assert len(modules) > 40
    assert set(modules) >= TORCH_FREE_MODULES & MODULES.keys()
    assert imported_without_torch(*modules) == ""


def test_the_block_works() -> None:
    """Negative control."""
    assert "torch is blocked" in imported_without_torch("april.models.lean")


@names_of_files()
def test_words_that_are_not_used(path: Path) -> None:
    text = path.read_text()
    found = re.findall(r"\bold_log_?p\w*|TODO|FIXME|XXX|NotImplementedError", text)
    assert found == [], f"{path.relative_to(ROOT)}: {found}"


@names_of_files()
def test_no_bare_asserts(path: Path) -> None:
    lines = [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.Assert)]
    assert lines == []


@names_of_files()
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES}  # type: ignore[operator]
    assert long == {}


def dispatches(tree: ast.AST, names: set[str]) -> list[int]:
    """Lines that compare something with an algorithm's or an atom's name."""
    lines = []
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        constants = [inner for part in parts for inner in ast.walk(part) if isinstance(inner, ast.Constant)]
        if any(isinstance(c.value, str) and c.value in names for c in constants):
            lines.append(constants[0].lineno)
    return lines


def algorithm_names() -> set[str]:
    spec = "".join(path.read_text() for path in (PACKAGE / "algorithms" / "specs").glob("*.py"))
    presets = {path.stem for path in (PACKAGE / "recipes" / "algorithm").glob("*.toml")}
    atoms = set(re.findall(r'type: Literal\["(\w+)"\]', spec))
    return presets | atoms - COLUMNS.keys() - {"constant"}  # the trainer fills columns; "constant" is a learning rate, too


def test_the_trainer_knows_no_algorithm_by_name() -> None:
    names = algorithm_names()
    assert {"grpo", "clip", "token_mean"} <= names
    found = {
        str(p.relative_to(ROOT)): dispatches(tree_of(p), names) for p in FILES if part_of(module_of(p)) in ("training", "run")
    }
    assert found
    assert {path: lines for path, lines in found.items() if lines} == {}
    bad = ast.parse('if config.type == "clip":\n    pass\nmatch x:\n    case "grpo":\n        pass\ny = x in ("dapo",)')
    assert sorted(dispatches(bad, names)) == [1, 4, 6]


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
    assert "test_architecture.py" in names
