"""Engines and a trainer in processes of their own, over each transport: the same run, also when a part is lost while a version
is on its way."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from april.core.errors import DataError
from april.models.policy import Policy
from april.run.loop import Run
from tests.integration.crash_helpers import final_weights, recipe_for
from tests.integration.fault_helpers import _drop_first
from tests.integration.test_async_processes import BOTH, BOUNDED, SYNC, check_whole, log_updates, rows_of, run_witnessed

ONE = (*BOTH, "evaluation.modes=[]")
"""One engine: which of several takes a sample is a matter of time, and with it the last bits of batched products."""
TRAINER = ("training.process=child", "evaluation.modes=[]")
ENGINE = ("engine.process=child", "evaluation.modes=[]")
POOL = (*ONE, "engine.replicas=2")
OVER = {
    "shared_memory": (),
    "disk": ("publishing.transport=disk", "publishing.bucket_mib=1"),
    "broadcast": ("publishing.transport=broadcast", "publishing.deadline_s=4"),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """A synchronous run with everything in one process, and its tokens."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, run_witnessed(folder, *SYNC, "evaluation.modes=[]")[1].tokens


def at_publish(run: Run, version: int, act: Callable[[Run], None]) -> None:
    """Do something once, when a version was written and before the engines are told of it."""
    publish, done = run.parts.driver.publish, []

    def acting(weights: Any, number: int, mode: Any) -> None:
        if number == version and not done:
            done.append(number)
            act(run)
        publish(weights, number, mode)

    run.parts.driver.publish = acting  # type: ignore[method-assign]


def finish(folder: Path, *overrides: str, version: int = 2, act: Callable[[Run], None] = lambda _run: None) -> Run:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    run = Run(recipe_for(folder, *overrides), resume=(folder / "recipe.toml").exists(), quiet=None)
    log_updates(run, folder)
    at_publish(run, version, act)
    run.run()
    return run


def members(run: Run) -> dict[str, Any]:
    return run.parts.engine.engines  # type: ignore[attr-defined, no-any-return]


def same_weights(one: Path, other: Path) -> bool:
    first, second = final_weights(one), final_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("transport", "places"),
    [
        pytest.param("disk", ONE, marks=pytest.mark.slow),
        ("broadcast", ONE),
        pytest.param("disk", TRAINER, marks=pytest.mark.slow),
        pytest.param("broadcast", TRAINER, marks=pytest.mark.slow),
        pytest.param("broadcast", ("training.ranks=2", *ENGINE), marks=pytest.mark.slow),
    ],
    ids=["disk", "broadcast", "disk-to-controller", "broadcast-to-controller", "broadcast-from-ranks"],
)
def test_a_synchronous_run_is_the_same_over_every_transport(
    transport: str, places: tuple[str, ...], tmp_path: Path, one_process: tuple[Path, dict[str, list[int]]]
) -> None:
    folder = tmp_path / "run"
    run, witness = run_witnessed(folder, *SYNC, *places, *OVER[transport])
    assert witness.tokens == one_process[1]
    assert "training.ranks=2" in places or same_weights(one_process[0], folder), "ranks sum in another order, and save parts"
    check_whole(folder)
    for row in rows_of(folder):
        assert row["weights_bytes"] > 1e6 and row["weights_write_s"] > 0
        assert places == TRAINER or (row["weights_read_bytes"] > 1e6 and row["weights_read_s"] > 0)
    assert run.parts.transport is not None and run.parts.transport.name == transport
    assert not (folder / "weights").exists(), "what the transport has written is gone with the run"


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared_memory", "disk", "broadcast"])
def test_an_update_that_is_dropped_is_caught_up_with(transport: str, tmp_path: Path) -> None:
    folder, dropped = tmp_path / "run", list[Any]()
    limits = ("limits.publish_s=10",)
    run = finish(
        folder, *SYNC, *POOL, *OVER[transport], *limits, act=lambda run: _drop_first(members(run)["embedded 1"], dropped)
    )
    assert dropped[0][0] == 2
    assert "did not serve version 2" in members(run)["embedded 1"].all_losses[0] and not members(run)["embedded 0"].all_losses
    check_whole(folder)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared_memory", "disk", "broadcast"])
def test_an_engine_that_dies_while_a_version_is_published_costs_nothing(transport: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = finish(
        folder, *BOUNDED, *POOL, *OVER[transport], act=lambda run: os.kill(members(run)["embedded 0"].pid, signal.SIGKILL)
    )
    assert "ended by SIGKILL" in members(run)["embedded 0"].all_losses[0]
    check_whole(folder)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared_memory", "disk", "broadcast"])
def test_a_trainer_that_dies_while_its_version_is_on_its_way_changes_no_bit(
    transport: str, tmp_path: Path, one_process: tuple[Path, dict[str, list[int]]]
) -> None:
    """Over a broadcast the version goes with the trainer, and is made again; elsewhere it stays."""
    folder = tmp_path / "run"
    run = finish(folder, *SYNC, *ONE, *OVER[transport], act=lambda run: os.kill(run.parts.trainer.pid or 0, signal.SIGKILL))  # type: ignore[union-attr]
    assert "SIGKILL" in run.parts.trainer.all_losses[0]  # type: ignore[union-attr]
    assert same_weights(one_process[0], folder)
    check_whole(folder)


@pytest.mark.slow
def test_a_corrupted_file_ends_the_run_and_it_can_be_resumed(
    tmp_path: Path, one_process: tuple[Path, dict[str, list[int]]]
) -> None:
    folder = tmp_path / "run"

    def corrupt(run: Run) -> None:
        path = max((folder / "weights").glob("weights-000002-*"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    with pytest.raises(DataError, match="a file of weights is damaged") as caught:
        finish(folder, *SYNC, *ONE, *OVER["disk"], act=corrupt)
    assert "weights-000002" in str(caught.value.where) and "--resume" in str(caught.value.hint)
    finish(folder, *SYNC, *ONE, *OVER["disk"])
    check_whole(folder)
    assert same_weights(one_process[0], folder)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra april-rl[vllm] is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transport", ["disk", "broadcast"])
def test_vllm_in_a_child_samples_with_what_was_published(transport: str, tmp_path: Path) -> None:
    """In a synchronous run its log-probs are the trainer's, although the weights change a lot."""
    folder = tmp_path / "run"
    engine = ("engine.type=vllm", "engine.max_running=24", "engine.kv_tokens=8192", "training.lr=1e-3")
    run_witnessed(folder, *SYNC, *engine, *ONE, *OVER[transport])
    check_whole(folder)
    assert max(row["mismatch_abs_max"] for row in rows_of(folder)) < 2e-3
    first, last = Policy.load(str(files("april") / "assets" / "policy")).weights(), final_weights(folder)
    assert max(float((first[name] - last[name]).abs().max()) for name in last) > 1e-3, "negative control"
