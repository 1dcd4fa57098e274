"""The examples of the documentation run, and its tables are those of the code and of a real run."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs_helpers import DOCS, PAGES, ROOT, blocks, every_page, name_of, section
from rollout_helpers import finish_step, make_driver, reply_of

from april import registry
from april.algorithms.atoms import COLUMNS
from april.algorithms.spec import SLOTS  # with the built-in atoms registered
from april.config.resolve import resolve
from april.core import errors
from april.core.errors import AprilError
from april.core.prompt import Prompt
from april.rewards.judge import check_gold
from april.rollout.schedules.april import AprilConfig, AprilSchedule
from april.rollout.schedules.sync import SyncConfig, SyncSchedule
from april.run.data import task_of, verifier_of

TASK = {"type": "items", "items": [{"question": "1", "answer": "1"}]}


@pytest.fixture(autouse=True)
def clean_registries() -> Iterator[None]:
    """What an example registers is forgotten after it."""
    kinds = {kind: dict(table) for kind, table in registry.KINDS.items()}
    slots = {slot: dict(table) for slot, table in SLOTS.items()}
    yield
    for known, saved in ((registry.KINDS, kinds), (SLOTS, slots)):
        for key, table in saved.items():
            known[key].clear()  # type: ignore[attr-defined]
            known[key].update(table)  # type: ignore[attr-defined]


# -- examples ------------------------------------------------------------------------------------------------------------


def runnable(page: Path) -> list[str]:
    """The Python blocks of a page that are run; those marked "sketch" only have to compile."""
    return [body for mark, body in blocks(page.read_text(encoding="utf-8"), "python") if mark != "sketch"]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name_of)
def test_examples_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    for body in runnable(page):
        exec(compile(body, str(page), "exec"), space)
    check_recipes(page.read_text(encoding="utf-8"), only_marked=True)
    assert any("assert" in body or "class Test" in body for body in runnable(page)), "an example shows its result"
    for contract in (value for key, value in space.items() if key.startswith("Test")):
        run_contract(contract)


def run_contract(kit: Any) -> None:
    """Run the tests of a contract kit that an example defines."""
    import unittest

    done = 0
    for name in (name for name in dir(kit) if name.startswith("test_")):
        try:
            getattr(kit(), name)()
            done += 1
        except unittest.SkipTest:
            continue
    assert done >= 10, "the kit runs most of its tests"


@every_page
def test_sketches_compile(page: Path) -> None:
    sketches = [body for mark, body in blocks(page.read_text(encoding="utf-8"), "python") if mark == "sketch"]
    assert all(compile(body, str(page), "exec") for body in sketches)


def check_recipes(text: str, only_marked: bool = False) -> int:
    """Resolve each TOML block as a recipe, or as part of one; marked blocks need what the page's Python registers."""
    checked = 0
    for mark, body in blocks(text, "toml"):
        tree = tomllib.loads(body)
        if mark == "preset":
            tree = {**tree.pop("recipe", {}), "algorithm": tree}
        elif bool(mark) != only_marked:
            continue
        resolve({"task": TASK, **tree})
        checked += 1
    return checked


@every_page
def test_recipes_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    plain = [mark for mark, _ in blocks(text, "toml") if mark in ("", "preset")]
    assert check_recipes(text) == len(plain)


@pytest.mark.parametrize("body", ["[schedul]\ntype = 'sync'", "[schedule]\ntype = 'april'\nmax_lag = 2", "[[schedule]"])
def test_a_wrong_recipe_is_found(body: str) -> None:
    with pytest.raises((AprilError, tomllib.TOMLDecodeError)):
        check_recipes(f"```toml\n{body}\n```\n")
    assert check_recipes("```toml\n[schedule]\ntype = 'sync'\n```\n") == 1


def refused_answers(text: str) -> list[str]:
    """What the rewards of a page's generated tasks say of right answers that they do not accept."""
    refused: list[str] = []
    for _, body in blocks(text, "toml"):
        tree = tomllib.loads(body)
        if tree.get("task", {}).get("type") == "reasoning_gym":
            recipe = resolve({**tree, "task": {**tree["task"], "size": 8}}).recipe
            task = task_of(recipe)
            golds = [(Prompt(str(item["id"]), [1], "", item), task.gold(item) or "") for item in task.load()]
            refused += check_gold(verifier_of(recipe, task), golds)
    return refused


def test_rewards_of_examples_accept_right_answers() -> None:
    text = (DOCS / "own_data_and_reward.md").read_text(encoding="utf-8")
    assert "reasoning_gym" in text and refused_answers(text) == []
    assert refused_answers(text.replace("gold_template", "# gold_template")) != [], "the check can fail"


# -- tables that repeat the code -----------------------------------------------------------------------------------------


def table_names(text: str, head: str) -> set[str]:
    """The back-ticked names in the first column of the table whose head begins like this."""
    rows = text.partition(f"| {head} |")[2].partition("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_slots_and_columns_are_those_of_the_code() -> None:
    text = (DOCS / "add_a_loss.md").read_text(encoding="utf-8")
    assert table_names(text, "slot") == set(SLOTS)
    assert table_names(text, "column") == set(COLUMNS)


def test_plan_fields_and_engine_calls_are_those_of_the_code() -> None:
    from april.engines.base import Engine
    from april.rollout.view import Plan

    assert table_names((DOCS / "add_a_schedule.md").read_text(encoding="utf-8"), "field of `Plan`") == set(Plan.__slots__)
    calls = {name.partition("(")[0] for name in table_names((DOCS / "add_an_engine.md").read_text(encoding="utf-8"), "call")}
    assert calls == {name for name in vars(Engine) if not name.startswith("_")} | {"caps"}


def test_the_error_tree_is_complete() -> None:
    tree = re.findall(r"(\w+(?:Error|Interrupted))\b|\b(Interrupted)\b", (DOCS / "errors.md").read_text(encoding="utf-8"))
    drawn = {first or second for first, second in tree}
    assert drawn == {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, AprilError)}


def test_schedule_options_are_those_of_the_code() -> None:
    text = (DOCS / "modes" / "april.md").read_text(encoding="utf-8")
    assert table_names(text, "option") == {f"schedule.{name}" for name in AprilConfig.model_fields if name != "type"}


def test_the_worked_examples_of_the_modes_are_what_the_schedules_do() -> None:
    page = (DOCS / "modes" / "sync.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| lengths"))
    lengths = [tuple(map(int, cell.split(","))) for cell in row.split("|")[2:-1]]
    for name, schedule in (
        ("sync", SyncSchedule(SyncConfig())),
        ("april", AprilSchedule(AprilConfig(over_provision=1.5, max_lag_steps=1))),
    ):
        driver = make_driver(schedule, lambda s: reply_of(lengths[s.id.serial][s.id.member]), groups_per_step=2, steps=3)
        rows = []
        for step in range(3):
            batch = driver.next_batch()
            trained = ", ".join(f"g{group.id.serial}" for group in batch.groups)
            rows.append(f"| {step} | {trained} | {driver.clock.now():.0f} s |")
            finish_step(driver)
        text = (DOCS / "modes" / f"{name}.md").read_text(encoding="utf-8")
        assert [row for row in rows if row not in text] == []
    assert "| 0 | g0, g1 | 6 s |" not in page, "the check can fail"


# -- the run folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run."""
    import april

    folder = tmp_path_factory.mktemp("docs") / "run"
    small = ("batch.groups_per_step=3", "batch.group_size=3", "sampling.max_new_tokens=48", "evaluation.num_problems=4")
    more = (
        "steps=2",
        "task.size=50",
        "evaluation.num_samples=2",
        "observe.transcripts_every_steps=1",
        f"out={json.dumps(str(folder))}",
    )
    april.train("quickstart", overrides=[*small, *more], quiet=None)
    return folder


def keys_of(file: Path) -> set[str]:
    records = (
        [json.loads(line) for line in file.read_text().splitlines()]
        if file.suffix == ".jsonl"
        else [json.loads(file.read_text())]
    )
    return {key for record in records for key in record}


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "transcripts.jsonl", "timeline.jsonl", "summary.json"])
def test_keys_of_a_run_are_documented(run_folder: Path, name: str) -> None:
    text = section((DOCS / "run_folder.md").read_text(encoding="utf-8"), name)
    written = keys_of(run_folder / name)
    described = set(re.findall(r"`(\w+)`", text))
    assert written and written - described == set()
    in_tables = {key for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "april").rglob("*.py"))
    assert [key for key in in_tables - written if f'"{key}"' not in source] == [], "a documented key that nothing writes"


def test_responses_of_transcripts_are_documented(run_folder: Path) -> None:
    text = section((DOCS / "run_folder.md").read_text(encoding="utf-8"), "transcripts.jsonl")
    first = json.loads((run_folder / "transcripts.jsonl").read_text().splitlines()[0])["responses"][0]
    assert set(first) - set(re.findall(r"`(\w+)`", text)) == set()


def test_files_of_a_run_are_documented(run_folder: Path) -> None:
    text = (DOCS / "run_folder.md").read_text(encoding="utf-8")
    files = {path.name + ("/" if path.is_dir() else "") for path in run_folder.iterdir()}
    assert [name for name in files if f"`{name}`" not in text] == []
    assert {"report.html", "checkpoints/", "metrics.jsonl"} <= files
