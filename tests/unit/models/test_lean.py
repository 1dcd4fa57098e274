"""The lean forward equals the Hugging Face module, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from april.core.errors import DataError, ModelError
from april.models.attention import group_lengths, packed_layout
from april.models.kv import KvBucket
from april.models.lean import LeanModel
from april.models.lean_decode import LeanDecoder
from april.testing.toy_model import ToyKind, toy_model

LENGTHS = [5, 9, 1, 30, 9, 7]
KINDS: list[ToyKind] = ["qwen3", "qwen2", "llama"]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def _options(kind: ToyKind) -> dict[str, Any]:
    return {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}


def _ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


def _reference(module: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([module(row[None]).logits[0] for row in ids.split(LENGTHS)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_equal_the_module(kind: ToyKind, tied: bool, dtype: torch.dtype) -> None:
    module = toy_model(kind, dtype=dtype, tied=tied, **_options(kind))
    lean = LeanModel.from_module(module)
    assert lean is not None
    ids = _ids()
    logits = lean.logits(lean.packed_hidden(ids, LENGTHS))
    torch.testing.assert_close(logits, _reference(module, ids), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_equal_the_module(kind: ToyKind, dtype: torch.dtype) -> None:
    module = toy_model(kind, dtype=dtype, **_options(kind))
    decoder = LeanDecoder.from_module(module)
    assert decoder is not None
    ids, shape = _ids(), decoder.shape
    states = decoder.prefill(ids, LENGTHS)
    logits = torch.cat([decoder.logits(states, index, 0, length) for index, length in enumerate(LENGTHS)])
    torch.testing.assert_close(logits, _reference(module, ids), rtol=0, atol=TOLERANCE[dtype], check_device=False)

    small, large = (KvBucket(shape.num_layers, shape.num_kv_heads, shape.head_dim, c, dtype, ids.device) for c in (16, 64))
    rows = {small: [0, 1, 2, 4, 5], large: [3]}
    order = [index for members in rows.values() for index in members]
    for bucket, members in rows.items():
        with torch.inference_mode():
            bucket.resize(len(members))
            for index in members:
                bucket.insert(states.kv_of(index), LENGTHS[index])
            bucket.set_lengths([LENGTHS[index] for index in members])
    histories = dict(enumerate(ids.split(LENGTHS)))
    for step in range(3):
        new = torch.arange(len(order)) + 3 * step
        with torch.inference_mode():
            for bucket in rows:
                bucket.begin_step()
        positions = torch.tensor([LENGTHS[index] + step for index in order])
        found = decoder.decode(new, positions, 64, list(rows))
        for place, index in enumerate(order):
            histories[index] = torch.cat([histories[index], new[place : place + 1]])
        expected = torch.stack([module(histories[index][None]).logits[0, -1] for index in order])
        torch.testing.assert_close(found.clone(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_module(kind: ToyKind, checkpointing: bool) -> None:
    module = toy_model(kind, dtype=torch.float64, tied=True, **_options(kind))
    lean, ids = LeanModel.from_module(module), _ids()
    assert lean is not None
    lean.logits(lean.packed_hidden(ids, LENGTHS, gradient_checkpointing=checkpointing)).logsumexp(-1).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    _reference(module, ids).logsumexp(-1).sum().backward()
    for name, parameter in module.named_parameters():
        # Norms run in float32 inside, so gradients agree to float32 rounding of their parts.
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_sequences_of_a_pack_do_not_see_each_other() -> None:
    lean = LeanModel.from_module(toy_model("qwen3", dtype=torch.float64))
    assert lean is not None
    ids = _ids()
    changed = ids.clone()
    changed[5:14] = 7
    before, after = (lean.packed_hidden(x, LENGTHS) for x in (ids, changed))
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[14:], after[14:])
    assert not torch.equal(before[5:14], after[5:14])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_neox", {}),
        ("gemma2", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3", {"hidden_act": "gelu"}),
        ("llama", {"attention_dropout": 0.1}),
    ],
)
def test_what_is_not_computed_exactly_is_refused(kind: ToyKind, options: dict[str, Any]) -> None:
    module = toy_model(kind, **options)
    assert LeanModel.from_module(module) is None
    assert LeanDecoder.from_module(module) is None


def test_an_adapted_projection_is_refused() -> None:
    module = toy_model("qwen3")
    assert LeanModel.from_module(module) is not None
    layer = module.model.layers[1].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj)
    assert LeanModel.from_module(module) is None


def test_loaded_weights_are_copies() -> None:
    module, other = toy_model("qwen3", seed=0), toy_model("qwen3", seed=1)
    decoder = LeanDecoder.from_module(module)
    assert decoder is not None
    ids = _ids()

    def hidden() -> torch.Tensor:
        return decoder.prefill(ids, LENGTHS).stream

    first = hidden()
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert torch.equal(hidden(), first)
    decoder.load(dict(other.named_parameters()))
    assert not torch.equal(hidden(), first)
    incomplete = {name: p for name, p in module.named_parameters() if "layers.1.mlp.up" not in name}
    loaded = hidden()
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        decoder.load(incomplete)
    assert torch.equal(hidden(), loaded)


def test_groups_of_lengths_bound_the_padding() -> None:
    lengths = sorted([3, 4, 5, 100, 101, 140, 400, 401, 402, 900])
    runs = group_lengths(lengths)
    assert [index for a, b in runs for index in range(a, b)] == list(range(len(lengths)))
    for a, b in runs:
        part = lengths[a:b]
        assert len(part) * part[-1] - sum(part) <= 0.15 * sum(part) + 64
    assert 1 < len(runs) < len(lengths)
    assert group_lengths([7] * 5) == [(0, 5)]


def test_a_layout_of_equal_lengths_needs_no_gathers() -> None:
    layout = packed_layout([4, 4, 4])
    assert layout.order is None and layout.blocks[0].pad_index is None
    assert layout.positions.tolist() == [0, 1, 2, 3] * 3
    moved = packed_layout([3, 1])
    assert moved.order is not None and moved.order.tolist() == [3, 0, 1, 2] and moved.starts == (1, 0)


def test_an_empty_sequence_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one token"):
        packed_layout([3, 0])
