"""Any atoms that `check` lets together make an algorithm: finite, blind to order, exact on fresh data, silent under a mask."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from april.algorithms.atoms import SLOTS
from april.algorithms.check import RunFacts, check
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.losses.compose import Algorithm, credit, policy_loss, stage
from april.algorithms.spec import AlgorithmConfig
from april.core.errors import RecipeError

F64 = torch.float64
FACTS = RunFacts(4, stale_tokens=True, has_reference=True, records_entropy=True, together="query")
REQUIRED: dict[str, dict[str, Any]] = {
    "fixed_length": {"constant": 7}, "overlong": {"max_tokens": 6, "buffer_tokens": 3},
    "weighted_parts": {"weights": {"part.a": 1.0}},
    "decoupled": {"parts": {"a": 1.0, "b": 0.5}}, "rubric": {"items": {"a": 1.0, "b": 2.0}},
    "tree_subgroups": {"segment_tokens": 2}, "tree_gain": {"segment_tokens": 2}, "tree_depthwise": {"segment_tokens": 2},
    "tree_inter_intra": {"segment_tokens": 2}, "polychromic": {"set_size": 2},
}  # fmt: skip
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
LOGPROBS = ("behaviour", "proximal", "reference")


def table(name: str, **more: Any) -> dict[str, Any]:
    return {"type": name, **REQUIRED.get(name, {}), **more}


@st.composite
def algorithms(draw: st.DrawFn) -> AlgorithmConfig:
    """An algorithm of random built-in atoms that `check` accepts."""

    def some(slot: str, most: int) -> list[str]:
        names = sorted(name for name, entry in SLOTS[slot].items() if isinstance(entry.function, str))
        return draw(st.lists(st.sampled_from(names), max_size=most, unique=True))

    def one(slot: str) -> str:
        return draw(st.sampled_from(sorted(name for name, entry in SLOTS[slot].items() if isinstance(entry.function, str))))

    surrogate, anchor = one("surrogate"), draw(st.sampled_from(["proximal", "behaviour"]))
    own = SLOTS["surrogate"][surrogate].config
    ratio = table("token") if getattr(own, "ratio_use", "") == "unused" else table(one("ratio"), anchor=anchor)
    bounds = table(one("bounds")) if getattr(own, "bounds_use", "") == "needed" else False
    if isinstance(bounds, dict) and bounds["type"] == "second_moment":
        bounds["anchor"] = ratio.get("anchor", "proximal")
    weights = {} if surrogate == "none" else {name: {} for name in some("weights", 2)}
    scored = surrogate == "hapo" or (isinstance(bounds, dict) and bounds["type"] == "entropy")
    advantage = one("advantage")
    objectives = {name: {} for name in some("objectives", 1)} | ({"value": {}} if advantage == "gae" else {})
    shaped = [] if advantage == "maximum_likelihood" else some("reward", 2)  # some punish, which only the data show
    data = {
        "reward": [table(name) for name in shaped],
        "advantage": table(advantage),
        "adjust": [table(name) for name in some("adjust", 2)] + ([table("normalised_entropy")] if scored else []),
        "ratio": ratio, "bounds": bounds, "surrogate": table(surrogate), "weights": weights,
        "penalties": {name: {} for name in some("penalties", 1)}, "objectives": objectives, "aggregate": table(one("aggregate")),
    }  # fmt: skip
    config = None
    with contextlib.suppress(RecipeError):
        config = AlgorithmConfig.model_validate(data)
        check(config, FACTS)
        return config
    assume(False)
    raise AssertionError


def batch_of(config: AlgorithmConfig, seed: int, *, fresh: bool = False) -> TokenBatch:
    """Every column at random; rewards, entropies and log-probs all differ, so that no order decides between equals."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (len(GROUPS),), generator=generator)
    layout = Layout(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), torch.tensor(GROUPS), 3)
    size, samples = layout.num_tokens, layout.num_samples

    def uniform(count: int = size) -> Tensor:
        return torch.rand(count, generator=generator, dtype=F64)

    proximal = -2 * uniform() - 0.05
    near = {name: proximal if fresh and name != "reference" else proximal + 0.4 * (uniform() - 0.5) for name in LOGPROBS}
    reward, mask = layout.spread(uniform(samples)), uniform() > 0.15
    columns = {name: layout.spread(uniform(samples)) for name in config.requires if name.startswith(("part.", "item."))}
    columns |= {"item.query": layout.spread(torch.tensor([0.0, 0.0, 1.0], dtype=F64)[layout.group_of_sample])}
    columns |= {"item.baseline_passes": torch.ones(size, dtype=F64), "item.meta": torch.zeros(size, dtype=F64)}
    columns |= {**near, "proximal": proximal, "reward": reward, "correct": (reward > 0.5).to(F64), "mask": mask}
    columns |= {
        "entropy": 3 * uniform(),
        "current_entropy": 3 * uniform(),
        "value": uniform(),
        "temperature": torch.ones(size).to(F64),
    }
    columns |= {"token_ids": (9 * uniform()).long(), "lag": (0 if fresh else 3) * torch.ones(size, dtype=torch.int64)}
    columns |= {
        "turn": layout.spread(torch.zeros(samples, dtype=torch.int64)),
        "anchor": layout.group_of_sample[layout.sample_of_token],
    }
    columns |= {
        "finished": layout.spread(uniform(samples) > 0.3),
        "step": torch.full((size,), 60),
        "trained": mask & (uniform() > 0.1),
    }
    moved = proximal if fresh else proximal + 0.2 * (uniform() - 0.5)
    return TokenBatch(layout, columns | {"start": moved})


def loss_of(atoms: Algorithm, tokens: TokenBatch, parts: list[Tensor] | None = None) -> tuple[float, Tensor]:
    """Loss and gradient (N,) of an optimiser step, in micro-batches of the given samples."""
    tokens = credit(atoms, tokens)
    staged = stage(atoms, tokens.with_columns(current=tokens["start"]))
    total, gradient = 0.0, torch.zeros_like(tokens["start"])
    for part in parts or [torch.arange(tokens.layout.num_samples)]:
        _, rows = tokens.layout.take(part)
        current = tokens["start"][rows].clone().requires_grad_()
        loss = policy_loss(atoms, current, staged.take(part)).total
        total += float(loss.detach())
        if loss.requires_grad:
            (gradient[rows],) = torch.autograd.grad(loss, current, allow_unused=True, materialize_grads=True)
    return total, gradient


def close(a: float, b: float, tolerance: float = 1e-8) -> bool:
    return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))


compositions = given(config=algorithms(), seed=st.integers(0, 10_000))
few = settings(max_examples=40, deadline=None)


@few
@compositions
def test_losses_and_gradients_are_finite(config: AlgorithmConfig, seed: int) -> None:
    total, gradient = loss_of(Algorithm.of(config), tokens := batch_of(config, seed))
    assert torch.isfinite(torch.tensor(total)) and bool(torch.isfinite(gradient).all())
    trained = credit(Algorithm.of(config), tokens)["trained"]
    assert not bool(gradient[~trained].any())


@few
@compositions
def test_the_order_of_groups_and_of_their_members_changes_nothing(config: AlgorithmConfig, seed: int) -> None:
    atoms, tokens = Algorithm.of(config), batch_of(config, seed)
    samples = torch.tensor([4 * group + member for group in (2, 0, 1) for member in (3, 1, 0, 2)])
    mixed = tokens.take(samples)
    renamed = Layout(mixed.layout.offsets, torch.tensor(GROUPS), 3)
    assert close(loss_of(atoms, tokens)[0], loss_of(atoms, TokenBatch(renamed, mixed.columns))[0])


@few
@compositions
def test_on_fresh_data_no_correction_changes_anything(config: AlgorithmConfig, seed: int) -> None:
    kept = {name: atom for name, atom in config.weights.items() if not atom.corrects and atom.type not in ("veto", "opsm")}
    anchored = getattr(config.bounds, "anchor", None)
    ratio = config.ratio if anchored else config.ratio.model_copy(update={"anchor": "proximal"})
    plain = config.model_copy(update={"weights": kept, "ratio": ratio})
    tokens = batch_of(config, seed, fresh=True)
    (total, gradient), (expected, slope) = (loss_of(Algorithm.of(each), tokens) for each in (config, plain))
    assert total == expected and torch.equal(gradient, slope)


@few
@compositions
def test_a_masked_batch_is_silent(config: AlgorithmConfig, seed: int) -> None:
    tokens = batch_of(config, seed)
    nothing = torch.zeros_like(tokens["mask"])
    total, gradient = loss_of(Algorithm.of(config), tokens.with_columns(mask=nothing, trained=nothing))
    assert total == 0 and not bool(gradient.any())


@few
@compositions
def test_any_split_into_micro_batches_is_the_same(config: AlgorithmConfig, seed: int) -> None:
    atoms, tokens = Algorithm.of(config), batch_of(config, seed)
    units = torch.tensor({"sample": list(range(len(GROUPS))), "group": GROUPS, "batch": [0] * len(GROUPS)}[atoms.unit])
    part = torch.randint(0, 3, (len(GROUPS),), generator=torch.Generator().manual_seed(seed))[units]
    parts = [indices for value in range(3) if len(indices := (part == value).nonzero().squeeze(-1))]
    (total, gradient), (expected, slope) = loss_of(atoms, tokens, parts), loss_of(atoms, tokens)
    assert close(total, expected, 1e-6) and torch.allclose(gradient, slope, rtol=1e-6, atol=1e-6)


def test_the_comparisons_can_fail() -> None:
    config = AlgorithmConfig.model_validate({"weights": {"tis": {}}})
    plain = config.model_copy(update={"weights": {}})
    stale, fresh = batch_of(config, 0), batch_of(config, 0, fresh=True)
    assert loss_of(Algorithm.of(config), stale)[0] != pytest.approx(loss_of(Algorithm.of(plain), stale)[0])
    assert loss_of(Algorithm.of(config), fresh)[0] == loss_of(Algorithm.of(plain), fresh)[0] != 0
    pairs = Algorithm.of(AlgorithmConfig.model_validate({"surrogate": "none", "bounds": False, "objectives": {"dpo": {}}}))
    alone = [torch.tensor([index]) for index in range(len(GROUPS))]
    assert pairs.unit == "group" and loss_of(pairs, stale, alone)[0] != pytest.approx(loss_of(pairs, stale)[0])
