"""Lengths, prompts and shapes of the benchmark, with literal numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from april.bench.case import Case
from april.bench.shapes import SHAPES, BenchShape, shape_named
from april.bench.workload import (
    WorkloadOptions,
    describe_lengths,
    lognormal_lengths,
    make_prompts,
    trace_lengths,
    workload_lengths,
)
from april.core.errors import DataError

LOGNORMAL_8 = [33, 11, 13, 11, 17, 215, 44, 30]


def test_lognormal_lengths_are_the_numbers_that_this_seed_gives():
    lengths = lognormal_lengths(8, mu=3.4, sigma=1.0, cap_tokens=512, seed=0)
    assert lengths.tolist() == LOGNORMAL_8
    assert lognormal_lengths(8, 3.4, 1.0, 512, seed=1).tolist() != lengths.tolist()
    # the first requests are the same however many there are
    assert lognormal_lengths(4, 3.4, 1.0, 512, seed=0).tolist() == LOGNORMAL_8[:4]


def test_lognormal_lengths_have_their_median_tail_and_cap():
    lengths = lognormal_lengths(20_000, mu=3.4, sigma=1.0, cap_tokens=512, seed=0)
    assert 29 <= np.median(lengths) <= 31  # exp(3.4) = 29.96
    assert lengths.max() == 512 and lengths.min() >= 1
    # P(z > ln 512 - 3.4) = P(z > 2.838) = 0.00227
    assert 0.0015 < (lengths == 512).mean() < 0.0031
    assert lognormal_lengths(500, 3.4, 1.0, 40, seed=0).max() == 40


def write_trace(folder: Path, lengths: list[int]) -> Path:
    path = folder / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"now,7,{length}\n" for length in lengths))
    return path


def test_trace_lengths_are_rows_of_the_trace_cut_at_the_cap(tmp_path):
    path = write_trace(tmp_path, [0, 5, 9, 700])
    assert sorted(trace_lengths(path, 4, cap_tokens=512, seed=0).tolist()) == [1, 5, 9, 512]
    assert trace_lengths(path, 3, 512, seed=3).tolist() == trace_lengths(path, 3, 512, seed=3).tolist()


def test_a_trace_that_cannot_serve_is_refused(tmp_path):
    path = write_trace(tmp_path, [5, 9])
    with pytest.raises(DataError, match="too short"):
        trace_lengths(path, 3, 512, seed=0)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="lacks its column"):
        trace_lengths(path, 1, 512, seed=0)
    with pytest.raises(DataError, match="no such trace"):
        trace_lengths(tmp_path / "none.csv", 1, 512, seed=0)
    with pytest.raises(DataError, match="needs a trace"):
        workload_lengths("azure", 1, WorkloadOptions())


def test_prompts_differ_between_rounds_and_are_shared_within_groups():
    options = WorkloadOptions(prompt_tokens=4, group_size=2, seed=0)
    prompts = make_prompts(5, 256, options, round_index=0)
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3] != prompts[4]
    assert [len(prompt) for prompt in prompts] == [4] * 5
    assert all(0 <= token < 256 for prompt in prompts for token in prompt)
    assert make_prompts(5, 256, options, 0) == prompts
    assert make_prompts(5, 256, options, 1) != prompts


def test_lengths_are_described_by_their_exact_numbers():
    described = describe_lengths(np.array([1, 2, 3, 10]))
    assert described == {"num": 4, "total": 16, "median": 2.5, "mean": 4.0, "p99": pytest.approx(9.79), "max": 10}


def test_a_shape_counts_its_parameters_and_bytes():
    shape = BenchShape("x", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=16, mlp_size=24, vocab_size=100)
    assert shape.layer_products == ((16, 64), (32, 16), (16, 48), (24, 16))
    assert shape.num_matmul_weights == 2 * (1024 + 512 + 768 + 384) + 1600  # 6976
    assert shape.num_parameters == 6976 + 2 * (32 + 16) + 16
    assert shape.flops_per_token == 13_952
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes


@pytest.mark.parametrize(("name", "low", "high"), [("1m", 0.9, 1.2), ("3m", 2.8, 3.5), ("25m", 23, 28), ("100m", 95, 105)])
def test_the_named_models_have_about_the_size_of_their_name(name, low, high):
    assert low <= SHAPES[name].num_parameters / 1e6 <= high
    with pytest.raises(DataError, match="unknown benchmark model"):
        shape_named(name + "x")


def test_the_counted_parameters_are_those_of_the_model_that_is_made(tmp_path):
    from safetensors.torch import load_file

    from april.bench.worker import make_model

    make_model("tiny", str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    distinct = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    assert sum(tensor.numel() for tensor in distinct.values()) == SHAPES["tiny"].num_parameters
    assert all(str(tensor.dtype) == "torch.float32" for tensor in tensors.values())


def test_static_batches_are_whole_for_equal_lengths_and_64_for_long_tails():
    assert Case(SHAPES["tiny"], "fixed", 256, WorkloadOptions()).batch_rows == 256
    assert Case(SHAPES["tiny"], "lognormal", 256, WorkloadOptions()).batch_rows == 64
    assert Case(SHAPES["tiny"], "lognormal", 16, WorkloadOptions()).batch_rows == 16
    with pytest.raises(DataError, match="after its first token"):
        Case(SHAPES["tiny"], "fixed", 4, WorkloadOptions(fixed_tokens=1))


@pytest.mark.parametrize("name", ["1m", "3m", "25m", "100m"])
def test_the_page_states_the_shapes_that_are_measured(name):
    shape = SHAPES[name]
    page = Path(__file__).parents[3] / "docs" / "engine_speed.md"
    row = next(line for line in page.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    heads = f"{shape.num_heads} ({shape.num_kv_heads}) x {shape.head_dim}"
    sizes = [str(shape.num_layers), str(shape.hidden_size), heads, str(shape.mlp_size), str(shape.vocab_size)]
    assert cells[1:] == [f"{shape.num_parameters / 1e6:.1f} M", *sizes]
