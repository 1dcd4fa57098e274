"""Every command from the outside: what it prints, what it leaves, and that scripts can read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.integration.command_helpers import Call, caller, check_one_screen, tiny

PROMISED = {
    "accuracy_before", "accuracy_after", "n_eval", "steps", "samples_trained", "tokens_generated", "wall_s", "rollout_s",
    "train_s", "idle_fraction", "parked_total", "resumed_total", "max_lag_steps", "stale_token_fraction", "length_bias",
    "ledger_balanced",
}  # fmt: skip


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    return caller(capfd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended."""
    from april.config.resolve import resolve
    from april.run.loop import Run

    folder = tmp_path_factory.mktemp("finished") / "run"
    resolved = resolve("quickstart", overrides=[*tiny(folder)[1:], "training.lr=3e-3"])
    Run(resolved, quiet=None, reward=lambda text, sample, item: float(len(text))).run()
    return folder


def test_help_comes_without_any_heavy_import() -> None:
    heavy = ["torch", "transformers", "numpy", "pydantic", "reasoning_gym", "matplotlib"]
    code = (
        "import sys\nfrom april.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for command in ("train", "evaluate", "compare", "warm-start", "report", "config", "list", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_the_check_of_heavy_imports_can_fail() -> None:
    code = "import sys\nimport april.cli.main, april.config.resolve\nprint('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"


def test_python_m_april_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "april", "config", "quickstart", "steps=3"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert any(line.split() == ["steps", "3", "#", "command", "line"] for line in done.stdout.splitlines())


def test_train_with_json_prints_one_line_and_nothing_else(call: Call, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text("def score(text, sample, item):\n    print('noise')\n    return float(len(text) < 9)\n")
    reward = ["reward.type=python", f"reward.path={tmp_path / 'noisy.py'}:score"]
    called = call("train", *tiny(tmp_path / "run", *reward), "--json")
    summary = called.json
    assert called.code == 0 and summary.keys() >= PROMISED
    assert summary["steps"] == 2 and summary["samples_trained"] == 16 and summary["ledger_balanced"] is True
    assert summary["parked_total"] > 0, "nothing was parked, so this shows little"
    assert "noise" in called.err and "step 2/2" in called.err


def test_train_says_what_it_came_to(call: Call, tmp_path: Path) -> None:
    called = call("train", *tiny(tmp_path / "run"), "--quiet")
    assert called.code == 0
    assert all(len(line) < 160 for line in called.out.splitlines())
    for text in ("held-out accuracy, greedy: ", " %", "2 steps, ", "the ledger balances", "report.html"):
        assert text in called.out
    for file in (
        "recipe.toml",
        "environment.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "summary.json",
        "report.html",
        "trace.json",
    ):
        assert (tmp_path / "run" / file).stat().st_size > 0, file


def test_nothing_of_the_libraries_leaks_to_the_terminal(call: Call, tmp_path: Path) -> None:
    called = call("train", *tiny(tmp_path / "run"), "--quiet")
    ours = ("step ", "evaluation ")
    assert [line for line in called.err.splitlines() if not line.startswith(ours)] == []


def test_dry_run_checks_everything_and_writes_nothing(call: Call, tmp_path: Path) -> None:
    plain = call("train", *tiny(tmp_path / "run"), "--dry-run")
    checks = call("train", *tiny(tmp_path / "run"), "--dry-run", "--json").json
    assert plain.code == 0 and checks["ok"] is True
    assert checks["checks"].keys() >= {"batch", "algorithm", "data", "lengths", "tokenizer", "reward", "disk"}
    assert all(f"ok  {name}" in plain.out for name in checks["checks"])
    assert not (tmp_path / "run").exists()


def test_a_second_run_needs_overwrite(call: Call, tmp_path: Path) -> None:
    assert call("train", *tiny(tmp_path / "run"), "--json").code == 0
    assert call("train", *tiny(tmp_path / "run")).code == 2
    again = call("train", *tiny(tmp_path / "run"), "--json", "--overwrite")
    assert again.code == 0 and again.json["steps"] == 2


def test_a_finished_run_can_be_made_longer(call: Call, tmp_path: Path) -> None:
    assert call("train", *tiny(tmp_path / "run"), "--json").code == 0
    longer = call("train", tmp_path / "run", "steps=3", "--resume", "--json")
    assert longer.json["steps"] == 3 and "the recipe of this run changes: steps: 2 -> 3" in longer.err
    assert call("config", tmp_path / "run", "--json").json["recipe"]["steps"] == 3


def test_evaluate_a_run_with_pass_at_k(call: Call, finished: Path) -> None:
    called = call("evaluate", finished, "--samples", 4, "--json")
    sampled = called.json["sampled"]
    assert set(called.json) == {"greedy", "sampled"} and sampled["num_samples"] == 4 and sampled["n_problems"] == 4
    assert 0 <= sampled["low"] <= sampled["accuracy"] <= sampled["high"] <= 1
    assert sampled["pass_at"]["1"] == pytest.approx(sampled["accuracy"])
    assert sampled["pass_at"]["1"] <= sampled["pass_at"]["2"] <= sampled["pass_at"]["4"]
    text = call("evaluate", finished, "--samples", 4).out
    assert "95 % interval" in text and "pass@4" in text


def test_evaluate_takes_the_trained_policy_of_a_run(call: Call, finished: Path) -> None:
    by_recipe = call("evaluate", finished, "--json").json
    by_model = call("evaluate", *tiny(finished), "--model", finished, "--json").json
    last = [json.loads(line) for line in (finished / "evaluations.jsonl").read_text().splitlines()][-2:]
    assert by_recipe == by_model
    assert {record["mode"]: record["length_mean"] for record in last} == {
        mode: record["length_mean"] for mode, record in by_recipe.items()
    }
    assert by_recipe != call("evaluate", *tiny(finished), "--json").json, "before the training it answered otherwise"


def test_report_is_written_again(call: Call, finished: Path, tmp_path: Path) -> None:
    called = call("report", finished, "--out", tmp_path / "again.html")
    assert called.code == 0 and called.out.strip() == str(tmp_path / "again.html")
    assert "<html" in (tmp_path / "again.html").read_text()
    assert call("report", finished, "--json").json == {"report": str(finished / "report.html")}


def test_export_says_where_the_policy_is(call: Call, finished: Path, tmp_path: Path) -> None:
    assert call("export", finished, tmp_path / "policy", "--json").json == {"folder": str(tmp_path / "policy")}
    assert (tmp_path / "policy" / "config.json").is_file()


def test_the_version_is_that_of_the_package(call: Call) -> None:
    import april

    assert call("--version").out == f"april {april.__version__}\n"


def test_config_says_where_each_value_comes_from(call: Call, tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text("steps = 7\n")
    given = ["quickstart", "--overlay", tmp_path / "more.toml", "schedule.type=sync", "batch.group_size=2"]
    origins = {line.split()[0]: line.split("# ")[-1] for line in call("config", *given).out.splitlines()}
    assert origins["steps"] == "more.toml" and origins["batch.group_size"] == "command line"
    assert origins["training.lr"] == "quickstart.toml" and origins["model.device"] == "default"
    assert origins["algorithm.surrogate.type"] == "preset grpo"
    assert "changed type from 'april' to 'sync'" in origins["schedule.over_provision"]
    as_json = call("config", *given, "--json").json
    assert as_json["recipe"]["steps"] == 7 and as_json["origins"]["steps"] == "more.toml" and as_json["dropped"]


def test_list_shows_every_component_and_its_options(call: Call) -> None:
    from april import registry
    from april.algorithms.spec import SLOTS

    table = call("list", "--json").json
    for kind in registry.KINDS:
        assert [entry["name"] for entry in table[kind]] == registry.names(kind)
    for slot, atoms in SLOTS.items():
        assert [entry["name"] for entry in table.get(f"algorithm.{slot}", [])] == sorted(atoms)
    assert {"quickstart"} <= {entry["name"] for entry in table["recipes"]}
    assert all(entry["summary"] for entries in table.values() for entry in entries)
    text = call("list").out
    assert "  math " in text and "answer_pattern" in text and "over_provision" in text


def test_list_of_one_kind(call: Call) -> None:
    schedule = call("list", "schedule").out
    assert schedule.startswith("schedule\n  april ") and "task" not in schedule.split()[0]
    assert call("list", "surrogate").out == call("list", "algorithm.surrogate").out
    assert "group_relative" not in call("list", "reward").out and "python" in call("list", "reward").out
    advantage = call("list", "algorithm.advantage").out
    assert "= (R - mean_g) / (std_g + eps)" in advantage and "certainty A; reads reward; presets grpo" in advantage
    assert "SAC Flow" in call("list", "algorithm").out and "SAC Flow" not in advantage


def test_doctor_finds_this_machine_well(call: Call) -> None:
    called = call("doctor", "--json")
    levels = {check["name"]: check["level"] for check in called.json["checks"]}
    assert called.code == 0 and called.json["ok"] is True
    assert levels["python"] == levels["torch"] == levels["disk"] == "ok"
    assert "torch" in call("doctor").out


def test_doctor_fails_on_a_known_bad_version(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from april.cli import doctor

    monkeypatch.setattr(doctor, "_installed", lambda name: "4.40.0" if name == "transformers" else "9.9")
    called = call("doctor", "--json")
    assert called.code == 1 and called.json["ok"] is False


def test_compare_two_schedules_over_one_seed(call: Call, tmp_path: Path) -> None:
    fast = ["evaluation.modes=['greedy']", "observe.timeline=false"]
    arguments = ["compare", *tiny(tmp_path / "unused", *fast), "--seeds", 1, "--out", tmp_path / "both"]
    called = call(*arguments, "--json")
    result = called.json
    assert called.code == 0 and result["seeds"] == 1 and list(result["arms"]) == ["april", "sync"]
    assert result["speedups"]["april"]["steps"]["runs"][0] > 0 and (tmp_path / "both" / "comparison.html").stat().st_size > 0
    assert not (tmp_path / "unused").exists()
    before = (tmp_path / "both" / "april-seed0" / "summary.json").stat().st_mtime_ns
    again = call(*arguments)
    assert again.code == 0 and "comparison.html" in again.out
    assert (tmp_path / "both" / "april-seed0" / "summary.json").stat().st_mtime_ns == before, "a finished run is kept"
    other = call(*arguments, "steps=3", "training.lr=1")
    check_one_screen(other, "has another recipe (2 values)", str(tmp_path / "both" / "april-seed0"), "steps: 2 -> 3", "--out")
    assert (tmp_path / "both" / "april-seed0" / "summary.json").stat().st_mtime_ns == before, "nothing is run or written"
    status = tmp_path / "both" / "april-seed0" / "status.json"
    status.write_text(status.read_text().replace('"finished"', '"interrupted"'))
    assert call(*arguments).code == 0
    assert (tmp_path / "both" / "april-seed0" / "summary.json").stat().st_mtime_ns > before, "an interrupted one is run again"


def test_compare_begins_no_run_after_one_that_fails(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []

    def failing(command: list[str], **_: object) -> SimpleNamespace:
        begun.append(command)
        return SimpleNamespace(returncode=7)

    monkeypatch.setattr("april.cli.compare.subprocess.run", failing)
    called = call("compare", *tiny(tmp_path / "unused"), "--out", tmp_path / "both{x}")
    assert called.code == 7 and len(begun) == 1
    assert f'out="{tmp_path}/both{{{{x}}}}/april-seed0"' in begun[0], "a folder's braces are no gaps to be filled"
    told = call("compare", *tiny(tmp_path / "unused"), "--out", tmp_path / "both", "--json")
    assert told.code == 7 and told.json["error"]["got"] == "exit code 7"


def test_arms_that_would_share_a_folder_are_refused(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("april.cli.compare.subprocess.run", lambda *_, **__: pytest.fail("nothing is begun"))
    arms = tmp_path / "arms.toml"
    arms.write_text('recipe = "quickstart"\nbaseline = "lag<1"\n[arms]\n"lag<1" = []\n"lag>1" = ["schedule.max_lag_steps=4"]\n')
    check_one_screen(call("compare", arms, "--out", tmp_path / "out"), "two arms would share a folder", "'lag<1' and 'lag>1'")
