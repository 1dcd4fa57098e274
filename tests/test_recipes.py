"""Every recipe that comes with April works, and survives being written and read again."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from april.config.load import recipe_names
from april.config.resolve import resolve
from april.run.build import build
from april.run.checks import check_recipe
from april.run.warm_start import resolve_warm_start, warm_start
from tests.integration.command_helpers import caller

PROVIDED = ["sampling.entropy=true", "model.reference=packaged", "batch.together=query"]
"""What some presets say that they need."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_there_are_recipes_of_each_sort() -> None:
    assert "quickstart" in recipe_names() and "sums" in recipe_names("warm_start")
    assert {"grpo", "dr_grpo", "rloo", "dapo"} <= set(recipe_names("algorithm"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_run_recipe_passes_its_dry_run(name: str, tmp_path: Path) -> None:
    parts = build(resolve(name, overrides=[f"out='{tmp_path / 'run'}'"]))
    assert {finding.name for finding in parts.findings} >= {
        "batch",
        "algorithm",
        "data",
        "lengths",
        "tokenizer",
        "reward",
        "disk",
    }
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", recipe_names("algorithm"))
def test_every_preset_resolves_and_passes_the_check(preset: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        f'task = {{ type = "reasoning_gym", name = "chain_sum" }}\n[algorithm]\npreset = "{preset}"\n', encoding="utf-8"
    )
    resolved = resolve(tmp_path / "own.toml", overrides=PROVIDED)
    assert check_recipe(resolved.recipe)
    assert resolved.origin("algorithm.advantage.type") == f"preset {preset}"


@pytest.mark.parametrize("preset", [preset for preset in recipe_names("algorithm") if preset != "rloo"])
def test_every_clipping_preset_fits_the_quickstart(preset: str) -> None:
    resolved = resolve("quickstart", overrides=[f"algorithm.preset={preset}", *PROVIDED])
    assert check_recipe(resolved.recipe)


def test_rloo_fits_the_quickstart_without_its_bounds() -> None:
    resolved = resolve("quickstart", overrides=["algorithm.preset=rloo", "algorithm.bounds=false"])
    assert check_recipe(resolved.recipe) and resolved.recipe.algorithm.surrogate.type == "plain"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_is_read_back_as_itself(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = caller(capfd)("config", name, "steps=5", "--toml").out
    (tmp_path / "copy.toml").write_text(text, encoding="utf-8")
    assert resolve(tmp_path / "copy.toml").recipe == resolve(name, overrides=["steps=5"]).recipe
    assert resolve(tmp_path / "copy.toml").recipe != resolve(name, overrides=["steps=6"]).recipe


@pytest.mark.parametrize("preset", recipe_names("algorithm"))
def test_parts_that_were_taken_away_stay_away(preset: str, tmp_path: Path) -> None:
    task = 'task = { type = "reasoning_gym", name = "chain_sum" }'
    (tmp_path / "own.toml").write_text(f'{task}\nschedule = {{ type = "sync" }}\n[algorithm]\npreset = "{preset}"\n')
    first = resolve(tmp_path / "own.toml", overrides=["algorithm.weights.tis=false"])
    (tmp_path / "copy.toml").write_text(first.to_toml(), encoding="utf-8")
    second = resolve(tmp_path / "copy.toml").recipe
    assert second == first.recipe
    written = (files("april") / "recipes" / "algorithm" / f"{preset}.toml").read_text(encoding="utf-8")
    assert (second.algorithm.bounds is None) == ("bounds = false" in written)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", recipe_names("warm_start"))
def test_every_warm_start_recipe_parses_and_its_short_form_makes_a_model(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = resolve_warm_start(name)
    assert all(stage.completions and stage.training.num_steps > 1 for stage in recipe.stages)  # type: ignore[attr-defined]
    stage = json.loads(recipe.stages[0].model_dump_json())
    stage["task"] |= {"size": 32}
    stage["training"] |= {"num_steps": 2, "batch_size": 4, "warmup_steps": 1}
    tree = {**json.loads(recipe.model_dump_json(exclude_none=True)), "excludes": None, "stages": [stage]}
    stage["completions"] = [{k: v for k, v in way.items() if v is not None} for way in stage["completions"]]
    stage["task"] = {key: value for key, value in stage["task"].items() if value is not None}
    seen: list[tuple[str, int, int]] = []
    short = resolve_warm_start({key: value for key, value in tree.items() if value is not None})
    summary = warm_start(short, tmp_path / "model", lambda stage, done, total, _p: seen.append((stage, done, total)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert [done for _, done, _ in seen] == [1, 2] and summary["tokens_trained"] > 0
    ids = torch.tensor([tokenizer.encode("1 + 2", add_special_tokens=False)])
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert tokenizer.eos_token_id is not None and summary["parameters"] == sum(p.numel() for p in model.parameters())


def test_warm_start_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    policy = Path(__file__).parents[1] / "april" / "assets" / "policy"
    (tmp_path / "short.toml").write_text(f'''
name = "short"
model = "{policy}"
prompt = {{ template = "{{metadata[expression]}}" }}
[[stages]]
name = "only"
completions = [{{ template = " = {{answer}}" }}]
training = {{ num_steps = 2, batch_size = 4, warmup_steps = 1 }}
task = {{ type = "reasoning_gym", name = "chain_sum", size = 16, options = {{ max_digits = 1, min_digits = 1 }} }}
''')
    call = caller(capfd)
    made = call("warm-start", tmp_path / "short.toml", "--out", tmp_path / "model", "--json")
    assert made.code == 0 and made.json["folder"] == str(tmp_path / "model") and made.json["losses"]["only"] > 0
    again = call("warm-start", tmp_path / "short.toml", "--out", tmp_path / "model")
    assert again.code == 2 and "holds a model already" in again.err
    dry = call("train", "quickstart", "--dry-run", "task.size=40", f"model.path={tmp_path / 'model'}", "batch.groups_per_step=2")
    assert dry.code == 0, "what a warm start made can be trained"
