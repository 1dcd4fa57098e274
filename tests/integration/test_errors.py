"""Bad input of every sort: one screen that says where, what it got, what it expected and what to do next; exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.integration.command_helpers import Call, Called, caller, check_one_screen, tiny

ITEMS = "prompt.template={question}", "task.type=jsonl", "reward.type=exact", "evaluation.num_problems=1"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    return caller(capfd)


BAD_RECIPES = {
    "misspelt key": (["sampling.top_pp=1"], "sampling.top_pp (from the command line)", "did you mean 'top_p'?"),
    "misspelt section": (["sampler.top_p=1"], "unknown key", "did you mean 'sampling'?"),
    "misspelt key in a list": (["task.mixture=[{nmae='chain_sum'}]"], "task.mixture.0.nmae", "did you mean 'name'?"),
    "wrong type": (["sampling.max_new_tokens=many"], "sampling.max_new_tokens", "'many'", "a valid integer"),
    "boolean for a number": (["batch.group_size=true"], "batch.group_size", "True", "a number, not true or false"),
    "boolean for a number or a word": (["schedule.over_provision=true"], "schedule.over_provision", "a number, not true"),
    "boolean in a list of numbers": (["training.betas=[true, 0.9]"], "training.betas", "a number, not true or false"),
    "too little KV memory": (["engine.kv_tokens=10"], "engine.kv_tokens", "+ 48 =", "at most 10"),
    "neither number nor word": (
        ["schedule.over_provision=abc"], "error: a value cannot be used\n", "over_provision (from", "number or 'adaptive'"
    ),
    "fault of a value": (["schedule.over_provision=0.5"], "used: a ratio below 1 cannot fill a batch\n", "groups in flight"),
    "chain that is none": (["algorithm.adjust=whiten"], "algorithm.adjust", "[{ type", "april list algorithm.adjust"),
    "key of a section": (["groups_per_step=4"], "unknown key", "did you mean 'batch.groups_per_step'?"),
    "key of several sections": (["size=4"], "did you mean 'task.size' or 'evaluation_task.size'?"),
    "option of a part without any": (["schedule.type=sync", "schedule.foo=1"], "expected: no options", "leave foo out"),
    "placement without Ray": (["placement.devices=shared"], "where:    placement.devices\n", "leave placement out"),
    "more mini-batches than groups": (["training.num_optimizer_steps=99"], "99 > 2", "one group for each mini-batch"),
    "out of range": (["steps=0"], "steps (from the command line)", "greater than or equal to 1"),
    "unknown task name": (["task.mixture=[{name='chain_summ'}]"], "chain_summ", "did you mean 'chain_sum'?"),
    "unknown component": (["schedule.type=aprill"], "unknown schedule", "one of april, ", "did you mean 'april'?"),
    "unknown atom": (["algorithm.surrogate.type=clipp"], "algorithm.surrogate.type", "did you mean 'clip'?"),
    "unknown option of an atom": (["algorithm.bounds.hihg=2"], "algorithm.bounds.hihg", "did you mean 'high'?"),
    "unknown preset": (["algorithm.preset=grop"], "algorithm.preset", "did you mean 'grpo'?"),
    "unknown name in a folder": (["out=runs/{nmae}"], "names a field that is not there", "out", "name, seed"),
    "unpaired brace in a folder": (["out=runs/{"], "out", "Single '{'", "{{ or }}"),
    "unknown conversion in a folder": (["out=runs/{name!x}"], "out", "{name!x}", "{{ or }}"),
    "folder without a name": (["out="], "a folder has no name", "runs/{name}"),
    "unknown name in a folder of weights": (
        ["publishing.transport=disk", "publishing.folder={bad}", "engine.process=child"], "publishing.folder", "name, seed"
    ),
    "no override": (["steps"], "path.to.key=value", "schedule.over_provision=2"),
    "component without type": (["task=3"], "a task is a table with a type", "jsonl"),
    "group of one": (["batch.group_size=1"], "algorithm.advantage, batch.group_size", "raise batch.group_size"),
    "top-p in training": (["sampling.top_p=0.9"], "sampling.top_p", "set top_p = 1"),
    "stale tokens uncorrected": (["algorithm.weights.tis=false"], "algorithm.weights, schedule.max_lag_steps", "tis"),
    "missing data file": (["task.type=jsonl", "task.path=/no/such/data.jsonl"], "task.path", "/no/such/data.jsonl"),
    "missing model folder": (["model.path=/no/such/model"], "model.path", "/no/such/model"),
    "missing relative model folder": (["model.path=./policy"], "model.path", "working directory"),
    "context too short": (["sampling.max_new_tokens=5000"], "sampling.max_new_tokens", "at most 1024", "at most 99"),
    "prompt too long": (["prompt.max_tokens=5"], "tokens", "at most 5 tokens", "prompt.max_tokens"),
    "unknown device": (["model.device=gpu"], "model.device", "april doctor"),
    "missing reward file": (["reward.type=python", "reward.path=nowhere.py:score"], "reward.path", "nowhere.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_cannot_work_is_one_screen(case: str, call: Call, tmp_path: Path) -> None:
    overrides, *texts = BAD_RECIPES[case]
    called = call("train", *tiny(tmp_path / "run", *overrides))
    check_one_screen(called, *texts)
    assert not (tmp_path / "run").exists(), "nothing is written before everything is checked"


def test_the_check_of_screens_can_fail() -> None:
    with pytest.raises(AssertionError, match="expected: is missing"):
        check_one_screen(Called(2, "", "error: x\n  where:    a\n  got:      b\n  next:     c\n"))
    with pytest.raises(AssertionError):
        check_one_screen(Called(1, "", "Traceback (most recent call last):"))


def test_a_cuda_device_that_is_not_there(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    called = call("train", *tiny(tmp_path / "run", "model.device=cuda"))
    assert called.code == 2
    check_one_screen(called, "no such CUDA device", "model.device", '"auto"')


def test_recipe_files_that_are_missing_or_broken(call: Call, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("steps = 3\n[batch]\ngroup_size = = 4\n")
    missing = call("train", tmp_path / "nothing.toml")
    misspelt = call("train", "quickstrat")
    overlay = call("train", *tiny(tmp_path / "run"), "--overlay", tmp_path / "broken.toml")
    assert {missing.code, misspelt.code, overlay.code} == {2}
    check_one_screen(missing, "nothing.toml", "april list recipes")
    check_one_screen(misspelt, "did you mean 'quickstart'?")
    check_one_screen(overlay, "broken.toml", "line 3")


def test_the_layer_that_set_a_bad_value_is_named(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nlr = 'fast'\n")
    called = call("train", *tiny(tmp_path / "run"), "--overlay", tmp_path / "mine.toml")
    assert called.code == 2
    check_one_screen(called, "training.lr (from mine.toml)", "'fast'")


MEANT = {
    "train /no/such/folder --resume": ("/no/such/folder", "check the path"),
    "train . --resume": ("a folder without recipe.toml", "no run was begun there"),
    "simulate nosuch.toml": ("nosuch.toml", "april list studies"),
    "simulate schedules steps=3": ("where:    steps", "did you mean 'base.steps'?"),
    "plan --model Qwen3-8B --lengths mean=1,max=9 --hardware H300": ("where:    --hardware", "did you mean 'H800'?"),
    "plan --model Qwen3-9B --lengths mean=1,max=9": ("where:    --model", "did you mean 'Qwen3-8B'?"),
    "plan --model Qwen3-8B --lengths nowhere": ("where:    --lengths", "nowhere", "mean=8000"),
    "plan --model Qwen3-8B --lengths mean=x": ("where:    --lengths mean", "'x'", "a number"),
    "plan --model Qwen3-8B --lengths meen=3": ("meen=3", "did you mean 'mean'?"),
    "export nosuch somewhere": ("nosuch", "a run's folder", "check the path"),
}


@pytest.mark.parametrize("line", MEANT)
def test_a_wrong_argument_is_one_screen(line: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_one_screen(call(*line.split()), *MEANT[line])
    assert not list(tmp_path.iterdir())


def test_an_export_over_something_is_refused(call: Call, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    check_one_screen(call("export", "packaged", tmp_path), "in use", str(tmp_path), "a folder with files in it")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"] and (tmp_path / "kept.txt").read_text() == "kept"


def test_an_option_that_is_a_value_of_the_recipe_says_how_to_write_it(call: Call) -> None:
    assert "a value of the recipe has no dashes: seed=VALUE; " in call("train", "quickstart", "--seed", 3).err
    assert "dashes" not in call("doctor", "--seed", 3).err
    assert "dashes" not in call("train", "quickstart", "--overlay").err


def test_with_json_an_error_is_one_line_of_json_too(call: Call, tmp_path: Path) -> None:
    called = call("train", *tiny(tmp_path / "run", "steps=0"), "--json")
    error = called.json["error"]
    assert called.code == 2 and error["what"] == "a value cannot be used" and error["got"] == "0"
    assert list(error) == ["what", "where", "got", "expected", "next"]
    assert called.err.startswith("error: a value cannot be used\n  where:    steps")
    assert call("train", "--nope", "--json").json["error"].keys() == {"what", "next"}


def test_an_evaluation_without_a_mode(call: Call, tmp_path: Path) -> None:
    called = call("evaluate", *tiny(tmp_path / "run", "evaluation.modes=[]"))
    check_one_screen(called, "nothing to evaluate", "evaluation.modes")
    assert called.out == "" and not (tmp_path / "run").exists()


def test_a_study_whose_base_names_no_schedule(call: Call, tmp_path: Path) -> None:
    called = call("simulate", "schedules", "base.schedule.type=aprill", "--out", tmp_path / "study")
    check_one_screen(called, "unknown schedule", "base.schedule.type", "did you mean 'april'?")
    assert not (tmp_path / "study").exists()


def test_data_that_cannot_be_used(call: Call, tmp_path: Path) -> None:
    contents = {"empty": "", "broken": "{'question': 1}", "wrong": '{"prompt": "1 + 1", "answer": "2"}'}
    for name, text in contents.items():
        (tmp_path / f"{name}.jsonl").write_text(text)

    def train(name: str) -> Called:
        files = [f"task.path={tmp_path / name}.jsonl", "evaluation_task.type=items"]
        return call("train", *tiny(tmp_path / "run", *ITEMS, *files, "evaluation_task.items=[{question='1 - 1',answer='0'}]"))

    found = {name: train(name) for name in contents}
    assert {called.code for called in found.values()} == {2}
    check_one_screen(found["empty"], "a data set is empty", "empty.jsonl")
    check_one_screen(found["broken"], "broken.jsonl, line 1", "one JSON object a line")
    check_one_screen(found["wrong"], "wrong.jsonl, line 1", "no 'question'", "task.question_field")


def test_a_prompt_longer_than_the_context(call: Call, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "novel", "question": "9" * 1200, "answer": "1"}))
    both = [f"task.path={tmp_path / 'long.jsonl'}", "evaluation_task.type=items", "prompt.max_tokens=4000"]
    called = call("train", *tiny(tmp_path / "run", *ITEMS, *both, "evaluation_task.items=[{question='1 - 1',answer='0'}]"))
    assert called.code == 2
    check_one_screen(called, "prompt novel", "1200 tokens", "at most 1023 tokens")


def test_a_tokenizer_without_an_end(call: Call, tmp_path: Path) -> None:
    from april.run.build import model_path

    folder = tmp_path / "endless"
    shutil.copytree(model_path("packaged"), folder)
    for name, key in (("tokenizer_config.json", "eos_token"), ("generation_config.json", "eos_token_id")):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in settings.items() if k != key}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    called = call("train", *tiny(tmp_path / "run", f"model.path={folder}"))
    assert called.code == 2
    check_one_screen(called, "no end-of-sequence token", str(folder), "eos_token")


def test_a_model_folder_without_a_model(call: Call, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    called = call("train", *tiny(tmp_path / "run", f"model.path={tmp_path / 'hollow'}"))
    assert called.code == 2
    check_one_screen(called, str(tmp_path / "hollow"))


def test_no_room_on_the_disk(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=5 << 20))
    called = call("train", *tiny(tmp_path / "run"))
    assert called.code == 2
    check_one_screen(called, "too little room", "5 MiB free", "checkpoint.keep=1")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_during_the_run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from april.checkpoint.journal import Journal

    def full(self: Journal, *, fsync: bool = False) -> None:
        raise OSError(28, "No space left on device", "journal/start.bin")

    monkeypatch.setattr(Journal, "flush", full)
    called = call("train", *tiny(tmp_path / "run"), "--quiet")
    assert called.code == 2
    last = [line for line in called.err.splitlines() if not line.startswith(("step", "evaluation"))]
    check_one_screen(
        Called(2, "", "\n".join(last)), "No space left on device", "journal/start.bin", "what was saved before is intact"
    )


REWARDS = """
calls = []
def listed(text, sample, item):
    return [1.0]
def raising(text, sample, item):
    raise KeyError("gold")
def only_gold(text, sample, item):
    if sample.id.serial == 0 and not len(sample):  # the check of right answers before the run
        return 1.0
    return [1.0, 2.0]
def breaks_in_training(text, sample, item):
    return 1.0 if sample.id.serial < 0 or not len(sample) else None
"""


@pytest.mark.parametrize(
    ("function", "what", "reason"),
    [
        ("listed", "fails on every right answer", "reward of the wrong shape: got list of 1, expected one number"),
        ("raising", "fails on every right answer", "KeyError: 'gold'"),
        ("only_gold", "fails on every response", "reward of the wrong shape: got list of 2, expected one number"),
        ("breaks_in_training", "no group can be trained", "None (is a `return` missing?)"),
    ],
)
def test_a_reward_that_never_works_ends_the_run_with_its_reason(
    function: str, what: str, reason: str, call: Call, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    own = ["reward.type=python", f"reward.path={tmp_path / 'rewards.py'}:{function}"]
    called = call("train", *tiny(tmp_path / "run", *own), "--quiet")
    assert called.code == 2
    screen = called.err[called.err.index("error: ") :]
    check_one_screen(Called(2, "", screen), what, reason)


def test_a_filter_that_drops_every_group_ends_the_run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from april.rollout import driver

    monkeypatch.setattr(driver, "MAX_FRUITLESS_BATCHES", 3)
    (tmp_path / "rewards.py").write_text("def same(text, sample, item):\n    return 1.0\n")
    own = ["reward.type=python", f"reward.path={tmp_path / 'rewards.py'}:same", "algorithm.filter=[{type='zero_variance'}]"]
    called = call("train", *tiny(tmp_path / "run", *own), "--quiet")
    assert called.code == 2
    check_one_screen(Called(2, "", called.err[called.err.index("error: ") :]), "no group can be trained", "filtered")


def test_a_reward_that_sometimes_fails_costs_samples_and_is_shown(call: Call, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def moody(text, sample, item):\n    if sample.id.member == 1:\n        raise OSError('no service')\n    return 1.0\n"
    )
    own = ["reward.type=python", f"reward.path={tmp_path / 'rewards.py'}:moody"]
    called = call("train", *tiny(tmp_path / "run", *own), "--quiet")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert called.code == 0 and summary["ledger"]["counts"]["failed"] == summary["ledger"]["issued"] / 4 > 0
    assert re.search(r"\d+ samples failed; most often: OSError: no service \(\d+\)", called.out)
    assert summary["ledger_balanced"] and summary["samples_trained"] == 12


def test_folders_that_do_not_fit_what_is_asked(call: Call, tmp_path: Path) -> None:
    nothing = call("train", *tiny(tmp_path / "run"), "--resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("steps = 3\n")
    taken = call("train", *tiny(tmp_path / "run"))
    assert {nothing.code, taken.code} == {2}
    check_one_screen(nothing, "no run to continue", str(tmp_path / "run"), "without --resume")
    check_one_screen(taken, "holds a run already", "--overwrite", "--resume")
    check_one_screen(call("report", tmp_path), "there is no such run", "without recipe.toml")
    check_one_screen(call("evaluate", *tiny(tmp_path), "--model", tmp_path / "run"), "no checkpoint yet")


def test_a_damaged_checkpoint_names_the_last_good_one(call: Call, tmp_path: Path) -> None:
    assert call("train", *tiny(tmp_path / "run")).code == 0
    good, bad = sorted((tmp_path / "run" / "checkpoints").iterdir())
    (bad / "trainer.pt").write_bytes(b"torn")
    refused = call("train", tmp_path / "run", "--resume")
    check_one_screen(refused, "the newest checkpoint is damaged", str(bad), "trainer.pt", str(good))
    shutil.rmtree(bad)
    resumed = call("train", tmp_path / "run", "--resume", "--json")
    assert resumed.code == 0 and resumed.json["steps"] == 2 and resumed.json["ledger_balanced"] is True


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "--nope"],
        ["trian"],
        ["evaluate", "quickstart", "--samples", "x"],
        ["evaluate", "quickstart", "--samples", "0"],
        ["compare", "quickstart", "--out", "--quiet"],
        ["compare", "quickstart", "--seeds", "0"],
        ["compare", "quickstart", "--seeds", "-1"],
    ],
)
def test_wrong_arguments_point_to_the_help(arguments: list[str], call: Call) -> None:
    called = call(*arguments)
    assert called.code == 2 and called.out == "" and len(called.err.splitlines()) == 2
    assert called.err.startswith("error: ") and "--help`" in called.err
