"""Runs on Ray: that of one process on one machine, two ranks and two engines on two nodes, and a node that dies in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from april.core.errors import ResourceError
from april.observe.status import read_status
from april.run.loop import Run
from tests.integration.ray_helpers import children_of, kill_node, num_held, on, two_nodes
from tests.integration.test_async_processes import APRIL, SYNC, check_whole, final_weights, rows_of, run_witnessed
from tests.integration.test_ranks_run import final_weights as exported_weights

ray = pytest.importorskip("ray", reason="the extra april-rl[ray] is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SMALL = ("engine.steps_per_poll=1", "engine.report_every_tokens=4", "evaluation.modes=[]")


def test_a_synchronous_run_on_ray_is_that_of_one_process_bit_for_bit(tmp_path: Path) -> None:
    """On a cluster that is started for the run, with a reward worker in an actor."""
    _, here = run_witnessed(tmp_path / "here", *SYNC)
    run, there = run_witnessed(tmp_path / "there", *SYNC, "backend=ray", "scoring.workers=1")
    assert there.tokens == here.tokens
    first, second = final_weights(tmp_path / "here"), final_weights(tmp_path / "there")
    assert all(torch.equal(first[name], second[name]) for name in first)
    check_whole(tmp_path / "there")
    rows = rows_of(tmp_path / "there")
    assert all(row["weights_bytes"] > 1e6 and row["weights_read_s"] > 0 for row in rows)
    assert run.parts.transport.name == "object_store" and not ray.is_initialized(), "no cluster is left"  # type: ignore[union-attr]


def test_two_ranks_and_two_engines_on_two_nodes_and_one_node_dies(tmp_path: Path) -> None:
    """Ranks compute in float64, so that the run of one process is the same but for the order of sums."""
    exact, killed = ("training.dtype=float64", *SYNC, *SMALL), list[Any]()
    run_witnessed(tmp_path / "here", *exact)
    with two_nodes() as (cluster, node):
        options = on(cluster, ranks=2)
        run, _ = run_witnessed(
            tmp_path / "two", *exact, *options, then=lambda run, _n: killed.append([child.node for child in children_of(run)])
        )
        assert any(len(set(nodes)) == 2 for nodes in killed), "ranks and engines are on both nodes"
        check_same(tmp_path / "here", tmp_path / "two")
        killed.clear()

        def kill(run: Run, num_finished: int) -> None:
            if num_finished >= 20 and not killed and num_held(run, node.node_id) > 2:
                killed.append(num_held(run, node.node_id))
                kill_node(cluster, node, run)

        run, witness = run_witnessed(tmp_path / "killed", *APRIL, *SMALL, *options, then=kill)
        assert killed and witness.lost and run.parts.engine.num_restarts >= 1  # type: ignore[attr-defined]
        check_whole(tmp_path / "killed")
        told = "; ".join(read_status(tmp_path / "killed")["losses"])
        assert "its node died" in told


def test_places_that_no_node_has_are_an_error_within_the_deadline(tmp_path: Path) -> None:
    wanted = ("backend=ray", "placement.engine.gpus=7", "placement.timeout_s=4")
    with pytest.raises(ResourceError, match=r"placement.engine\n.*nodes with .* CPU\n.*1 times 1 CPU, 7 GPU, pack, within 4 s"):
        run_witnessed(tmp_path / "run", *SYNC, *wanted)
    assert not ray.is_initialized()


def test_engines_on_the_devices_of_the_trainer_sleep_while_it_computes(tmp_path: Path) -> None:
    asleep: list[str] = []
    folder = tmp_path / "run"

    def watch(run: Run, _num_finished: int) -> None:
        engine: Any = run.parts.engine
        if not asleep:
            plain, awake = engine.sleep, engine.wake
            engine.sleep = lambda: (asleep.append("sleep"), plain())
            engine.wake = lambda: (asleep.append("wake"), awake())
            asleep.append("watched")

    run_witnessed(folder, *APRIL, *SMALL, "backend=ray", "placement.devices=shared", then=watch)
    check_whole(folder)
    assert asleep == ["watched", *["sleep", "wake"] * 3]


def check_same(one: Path, two: Path) -> None:
    first, second = exported_weights(one), exported_weights(two)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-9
    check_whole(two)
