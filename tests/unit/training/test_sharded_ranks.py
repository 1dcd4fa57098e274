"""The trainer on 1, 2 and 4 ranks: the loss, the gradient, the update and what is saved are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from sharded_cases import CASES, IN_HALF_PRECISION, SAVED, everything, outcome, run_ranks
from torch.distributed.checkpoint import FileSystemReader

from april.models.policy import Policy
from april.training.config import ShardingConfig, TrainerConfig
from april.training.sharded_ranks import deal

COUNTS = [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The same in one process; leaves a checkpoint, too."""
    torch.set_num_threads(1)
    for name in SAVED:
        trainer = CASES[name].trainer(None)
        trainer.update(CASES[name].batch(0))
        own = folder / name.replace(" ", "_") / "checkpoint-0"
        own.mkdir(parents=True)
        trainer.save(own)
    return {name: outcome(case.trainer(None), case) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=COUNTS)
def found(request: pytest.FixtureRequest, folder: Path, alone: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield run_ranks(request.param, folder) | {"count": request.param}


def gap(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest difference over the largest value."""
    assert len(ours) == len(theirs) > 0
    largest = max(float(tensor.abs().max()) for tensor in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def test_ranks_do_the_update_of_one_process(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for name in found["names"]:
        exact = CASES[name].dtype == torch.float64 and CASES[name].kind == "qwen3"  # other forwards take norms in float32
        tolerance = 1e-10 if exact else 1e-5
        ours, theirs = found[name], alone[name]
        num = ours["num_parameters"]
        assert gap(ours["gradients"][:num], theirs["gradients"][:num]) < tolerance, name
        if theirs["value gradients"]:
            assert gap(ours["value gradients"], theirs["value gradients"]) < 10 * tolerance, f"{name}: value model"
        assert gap(ours["gradients"], theirs["gradients"]) < 10 * tolerance, f"{name}: of weights that have drifted apart"
        keys = sorted(theirs["weights"])
        assert sorted(ours["weights"]) == keys
        assert gap([ours["weights"][key] for key in keys], [theirs["weights"][key] for key in keys]) < tolerance, name
        for our_row, their_row in zip(ours["metrics"], theirs["metrics"], strict=True):
            assert our_row == pytest.approx(their_row, rel=tolerance, abs=tolerance, nan_ok=True), name


def test_another_case_would_be_noticed(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert gap(found["float64"]["gradients"], alone["whole groups"]["gradients"]) > 1e-3


def test_half_precision_is_near_and_not_the_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    half, whole = (torch.cat([tensor.flatten() for tensor in one["gradients"][:25]]) for one in (found["half"], alone["float32"]))
    assert 0.98 < float(torch.cosine_similarity(half, whole, dim=0)) < 1 - 1e-6
    assert {tensor.dtype for tensor in found["half"]["weights"].values()} == {IN_HALF_PRECISION.dtype}


@pytest.mark.parametrize("offload", [False, True])
def test_layers_compute_in_half_and_weights_are_kept_whole(found: dict[str, Any], offload: bool) -> None:
    facts = found["precision"][offload]
    assert facts["computed"] == {torch.bfloat16}
    assert facts["gradients"] == facts["kept"] == facts["moments"] == {torch.float32}
    # a step of 1e-6 reaches the weights, although in bfloat16 hardly one of them would have moved
    assert min(facts["moved"]) > 1e-7 and max(facts["seen in bfloat16"]) < 0.1


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_by_all_with_its_samples(found: dict[str, Any]) -> None:
    told = found["refused"]
    assert len(told) == found["count"] and len(set(told)) == 1
    assert "the loss is not finite" in told[0] and "samples g" in told[0]


def test_a_checkpoint_loads_at_another_number_of_ranks(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert {f"{name}: checkpoint-0" for name in SAVED} <= found["resumed"].keys()
    for name, weights in found["resumed"].items():
        expected = alone[name.partition(":")[0]]["weights"]
        assert gap([weights[key] for key in expected], list(expected.values())) < 1e-10, name


def test_one_process_reads_what_ranks_wrote(found: dict[str, Any], alone: dict[str, Any], folder: Path) -> None:
    case = CASES["tied embeddings"]
    trainer = case.trainer(None)
    written = folder / "tied_embeddings" / f"checkpoint-{found['count']}"
    assert (written / "shards" / ".metadata").is_file()
    trainer.load(written)
    assert trainer.version == 1
    exported = Policy.load(written / "model", dtype=torch.float64).weights()
    assert gap([exported[name] for name in trainer.weights()], list(trainer.weights().values())) == 0.0
    assert "lm_head.weight" not in load_file(written / "model" / "model.safetensors"), "tied weights are written once"
    trainer.update(case.batch(1))
    expected = alone["tied embeddings"]["weights"]
    assert gap([trainer.weights()[name] for name in expected], list(expected.values())) < 1e-10


@pytest.mark.parametrize("name", ["adapters", "value model", "adapters, value model"])
def test_one_process_reads_adapters_and_value_models_of_ranks(
    found: dict[str, Any], alone: dict[str, Any], folder: Path, name: str
) -> None:
    written, case = folder / name.replace(" ", "_") / f"checkpoint-{found['count']}", CASES[name]
    trainer = case.trainer(None)
    trainer.load(written)
    trainer.update(case.batch(1))
    expected = alone[name]["weights"]
    assert gap([everything(trainer)[key] for key in expected], list(expected.values())) < 1e-10
    assert (written / "value" / "shards").is_dir() is (trainer._value is not None)
    assert (written / "adapter").is_dir() is (trainer.policy.adapters is not None) is not (written / "model").is_dir()


def test_shards_of_adapters_hold_nothing_else(found: dict[str, Any], folder: Path) -> None:
    written = folder / "adapters" / f"checkpoint-{found['count']}" / "shards"
    names = FileSystemReader(written).read_metadata().state_dict_metadata
    assert len(names) == 3 * 2 * 7 * 2  # weights and two moments of A and B of seven layers in two blocks
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


def test_options_of_ranks_are_refused_on_one() -> None:
    assert TrainerConfig(ranks=2, sharding=ShardingConfig(cpu_offload=True)).sharding.cpu_offload
    with pytest.raises(ValidationError, match="no effect on one rank"):
        TrainerConfig(sharding=ShardingConfig(cpu_offload=True))


def test_work_is_dealt_by_hand() -> None:
    assert deal([5, 9, 4, 1], 2) == [[1, 3], [0, 2]]
    assert deal([3], 3) == [[0], [], []]
    assert deal([], 2) == [[], []]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 6))
def test_every_piece_is_dealt_once_and_evenly(weights: list[int], count: int) -> None:
    shares = deal(weights, count)
    assert sorted(index for share in shares for index in share) == list(range(len(weights)))
    loads = [sum(weights[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(weights)
    assert (min(loads) > 0) == (len(weights) >= count)
