"""What every atom of the loss must do, whatever its formula: gradients, masks, order, splits, and no change on fresh data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from april.algorithms.atoms import SLOTS
from april.algorithms.columns import TokenBatch
from april.algorithms.losses import objectives, pairs, penalties, ratio, surrogate
from april.algorithms.losses.compose import Algorithm, policy_loss, stage
from april.algorithms.losses.surrogate import Bounds
from tests.unit.algorithms.loss_helpers import F64, algorithm, batch_of, random_batch, step_loss, tensor

CLIP = {"type": "constant", "low": 0.9, "high": 1.1}
UNBOUNDED = ("plain", "importance", "none", "soft_gate", "mirror", "dppo", "vespo")
CORRECTIONS = ["tis", "tis_normalised", "mask", "reject", "veto", "opsm", "m2po"]
PAIR_KINDS = tuple(pairs.LOSSES)
COMPOSED: dict[str, dict[str, Any]] = {
    **{f"surrogate {name}": {"surrogate": name, "bounds": False if name in UNBOUNDED else CLIP} for name in SLOTS["surrogate"]},
    **{f"ratio {name}": {"ratio": name} for name in SLOTS["ratio"]},
    **{f"anchored {name}": {"ratio": {"type": name, "anchor": "behaviour"}} for name in SLOTS["ratio"]},
    "ratio sum": {"ratio": {"type": "sequence", "reduce": "sum", "gradient": "sequence"}},
    "segments of a version": {"ratio": {"type": "segment", "by": "lag"}},
    **{f"bounds {name}": {"bounds": name, "ratio": {"type": "token", "anchor": "behaviour"}} for name in SLOTS["bounds"]},
    **{f"weight {name}": {"weights": {name: {}}} for name in SLOTS["weights"]},
    **{f"survivors {name}": {"weights": {name: {"in_denominator": False}}} for name in CORRECTIONS[2:]},
    **{f"penalty {name}": {"penalties": {name: {"coefficient": 0.3}}} for name in SLOTS["penalties"]},
    **{f"objective {name}": {"objectives": {name: {}}} for name in SLOTS["objectives"] if name != "value"},
    "all pairs": {"surrogate": "none", "bounds": False, "objectives": {"rpo": {"pairs": "all"}}},
    **{f"aggregate {name}": {"aggregate": {"type": name, **({"constant": 7} if name == "fixed_length" else {})}}
       for name in SLOTS["aggregate"]},
}  # fmt: skip
BUILT_IN = {slot: {name for name, entry in SLOTS[slot].items() if isinstance(entry.function, str)} for slot in SLOTS}
WHOLE_STEP = {"penalty kl_cov", "objective bco", "objective aot"}


def current_of(tokens: TokenBatch, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return tokens["proximal"] + 0.15 * torch.randn(len(tokens["proximal"]), generator=generator, dtype=F64)


def with_all(tokens: TokenBatch) -> TokenBatch:
    return tokens.with_columns(current=tokens["proximal"])


@pytest.mark.parametrize("name", COMPOSED)
def test_finite_and_something_to_learn(name: str) -> None:
    tokens = random_batch()
    loss, gradient = step_loss(algorithm(**COMPOSED[name]), tokens, current_of(tokens))
    assert torch.isfinite(loss.total) and torch.isfinite(gradient).all()
    assert gradient[~tokens["trained"]].abs().max() == 0
    assert bool(gradient.abs().max() > 1e-6) is (name != "surrogate none")


@pytest.mark.parametrize("name", COMPOSED)
def test_a_batch_without_a_mask_gives_zeros(name: str) -> None:
    tokens = random_batch()
    nothing = torch.zeros_like(tokens["mask"])
    hidden = tokens.with_columns(mask=nothing, trained=nothing, behaviour=torch.full_like(tokens["behaviour"], -torch.inf))
    loss, gradient = step_loss(algorithm(**COMPOSED[name]), hidden, current_of(tokens))
    assert loss.total == 0 and gradient.abs().max() == 0


def permuted(tokens: TokenBatch, order: list[int]) -> TokenBatch:
    return tokens.take(torch.tensor(order))


@pytest.mark.parametrize("name", COMPOSED)
def test_the_order_of_samples_and_groups_changes_nothing(name: str) -> None:
    atoms, tokens = algorithm(**COMPOSED[name]), random_batch()
    with_current = tokens.with_columns(start=current_of(tokens))
    totals = []
    for order in (range(6), [4, 0, 5, 2, 1, 3]):
        mixed = permuted(with_current, list(order))
        totals.append(float(step_loss(atoms, mixed, mixed["start"])[0].total.detach()))
    assert totals[0] == pytest.approx(totals[1], abs=1e-12)


@pytest.mark.parametrize("name", [name for name in COMPOSED if name not in WHOLE_STEP])
def test_any_split_into_groups_adds_up(name: str) -> None:
    atoms, tokens = algorithm(**COMPOSED[name]), random_batch()
    tokens = tokens.with_columns(current=current_of(tokens))
    staged = stage(atoms, tokens)
    whole = policy_loss(atoms, tokens["current"], staged).total
    parts = [staged.take(torch.tensor(part)) for part in ([3, 5, 4], [2, 0, 1])]
    assert float(sum(policy_loss(atoms, part["current"], part).total for part in parts)) == pytest.approx(float(whole), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in COMPOSED if name not in WHOLE_STEP])
def test_packed_and_padded_layouts_agree(name: str) -> None:
    atoms, tokens = algorithm(**COMPOSED[name]), random_batch()
    tokens = tokens.with_columns(start=current_of(tokens))
    width, layout = 8, tokens.layout
    rows = torch.cat(
        [torch.arange(width).clamp(max=int(n) - 1) + int(o) for n, o in zip(layout.lengths, layout.offsets, strict=False)]
    )
    real = torch.cat([torch.arange(width) < int(n) for n in layout.lengths])
    padded = batch_of([width] * 6, [0, 0, 0, 1, 1, 1], **{name: column[rows] for name, column in tokens.columns.items()})
    padded = padded.with_columns(mask=padded["mask"] & real, trained=padded["trained"] & real)
    one, other = (step_loss(atoms, batch, batch["start"])[0].total.detach() for batch in (tokens, padded))
    assert float(one) == pytest.approx(float(other), abs=1e-12)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_fresh_tokens_of_an_engine_that_agrees_are_not_corrected(name: str) -> None:
    plain, corrected = algorithm(), algorithm(weights={name: {}})
    fresh, stale = random_batch(fresh=True), random_batch()
    assert torch.equal(*(step_loss(atoms, fresh, fresh["proximal"])[0].total for atoms in (plain, corrected)))
    tight = {"tis": {"cap": 1.0}, "tis_normalised": {"cap": 1.0}, "mask": {"low": 0.99, "high": 1.01}, "veto": {"below": 0.9}}
    options = tight.get(name, {"reject": {"high": 1.01}, "opsm": {"max_divergence": 0.0}, "m2po": {"budget": 1e-3}}.get(name, {}))
    acting = algorithm(weights={name: options})
    assert not torch.equal(*(step_loss(atoms, stale, stale["proximal"])[0].total for atoms in (plain, acting)))


@pytest.mark.parametrize(
    "options", [{"bounds": "shifted"}, {"bounds": "second_moment"}, {"ratio": {"type": "token", "anchor": "behaviour"}}]
)
def test_on_fresh_data_every_off_policy_form_is_plain_ppo(options: dict[str, Any]) -> None:
    fresh, anchored = random_batch(fresh=True), {"ratio": {"type": "token", "anchor": "behaviour"}, **options}
    plain, other = (step_loss(atoms, fresh, fresh["proximal"]) for atoms in (algorithm(), algorithm(**anchored)))
    assert torch.equal(plain[0].total, other[0].total) and torch.equal(plain[1], other[1])


ON_POLICY = [name for name in SLOTS["surrogate"] if name not in ("none", "hapo", "geometric_mean")]


@pytest.mark.parametrize("name", [*ON_POLICY, "geometric_mean"])
def test_on_policy_every_surrogate_has_the_plain_gradient(name: str) -> None:
    tokens = random_batch(fresh=True)
    bounds = False if name in UNBOUNDED else CLIP
    _, gradient = step_loss(algorithm(surrogate=name, bounds=bounds), tokens, tokens["proximal"])
    _, expected = step_loss(algorithm(surrogate="plain", bounds=False), tokens, tokens["proximal"])
    assert torch.allclose(gradient, expected, atol=1e-12) and expected.abs().max() > 0.01


DIFFERENTIABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (surrogate.clip, {"dual_clip": 3.0}),
    "importance": (surrogate.importance, {}),
    "plain": (surrogate.plain, {}),
    "soft_gate": (surrogate.soft_gate, {}),
    "geometric_mean": (surrogate.geometric_mean, {}),
    "mirror": (surrogate.mirror, {"tau": 0.3}),
    "dppo": (surrogate.dppo, {}),
    "hapo": (surrogate.hapo, {}),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_surrogates_equal_finite_differences(name: str) -> None:
    function, options = DIFFERENTIABLE[name]
    tokens = random_batch(stale_untrained=False)
    limits: Bounds = (torch.full_like(tokens["advantage"], 0.9), torch.full_like(tokens["advantage"], 1.1))

    def loss(current: Tensor) -> Tensor:
        log_ratio = ratio.token(current, tokens["proximal"], tokens)
        result: Tensor = function(log_ratio, current, tokens["advantage"], limits, tokens, **options)[0]
        return result

    assert torch.autograd.gradcheck(loss, (current_of(tokens).requires_grad_(),), atol=1e-7)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradients_of_sequence_ratios_equal_finite_differences(reduce: Any) -> None:
    tokens = random_batch()

    def whole(current: Tensor) -> Tensor:
        return ratio.sequence(current, tokens["proximal"], tokens, reduce=reduce, gradient="sequence")

    assert torch.autograd.gradcheck(whole, (current_of(tokens).requires_grad_(),), atol=1e-7)


@pytest.mark.parametrize("by", ["turn", "lag"])
def test_segment_ratios_have_the_value_of_the_segment_and_the_gradient_of_the_token(by: Any) -> None:
    tokens = random_batch()
    current = current_of(tokens).requires_grad_()
    found = ratio.segment(current, tokens["proximal"], tokens, by=by)
    segments = ratio.segment_layout(tokens, by)
    own = ratio.token(current.detach(), tokens["proximal"], tokens)
    assert torch.allclose(found.detach(), segments.spread(segments.mean(own, tokens["mask"])))
    assert not torch.allclose(found.detach(), own)
    assert torch.equal(torch.autograd.grad(found.sum(), current)[0], torch.ones_like(current))


@pytest.mark.parametrize(("name", "weight"), [("cispo", "bounded"), ("topr", "tapered"), ("vespo", "window")])
def test_surrogates_with_detached_weights_have_the_gradient_of_the_weighted_log_prob(name: str, weight: str) -> None:
    tokens = random_batch(stale_untrained=False)
    log_ratio = (current_of(tokens) - tokens["proximal"]).detach()
    limits = (torch.full_like(log_ratio, 0.9), torch.full_like(log_ratio, 1.1))
    function = getattr(surrogate, name)
    current = current_of(tokens).requires_grad_()
    loss, _ = function(log_ratio, current, tokens["advantage"], limits, tokens)
    (gradient,) = torch.autograd.grad(loss.sum(), current)
    assert torch.allclose(gradient * current.detach(), loss.detach()), f"{weight} weights are constants"
    assert not torch.allclose(gradient, -tokens["advantage"])


PENALTIES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in ("k1", "abs", "k2", "k3")},
    "weighed": {"kind": "k3", "importance": "behaviour"},
    "weighed k1": {"kind": "k1", "importance": "proximal"},
    "behaviour": {"kind": "k2", "against": "behaviour"},
}


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_of_penalties_equal_finite_differences(name: str) -> None:
    tokens = random_batch()
    check = torch.autograd.gradcheck(
        lambda c: penalties.divergence(c, tokens, **PENALTIES[name]), (current_of(tokens).requires_grad_(),)
    )
    assert check and torch.autograd.gradcheck(lambda c: penalties.convex(c, tokens), (current_of(tokens).requires_grad_(),))


def test_gradients_of_kl_cov_and_of_the_entropy_equal_finite_differences() -> None:
    tokens = with_all(random_batch())

    def held_back(current: Tensor) -> Tensor:
        return penalties.covariance(current, tokens, fraction=0.3)

    def bonus(entropy: Tensor) -> Tensor:
        return penalties.entropy(tokens["proximal"], tokens.with_columns(current_entropy=entropy))

    start = current_of(tokens).requires_grad_()
    assert torch.autograd.gradcheck(held_back, (start,)) and held_back(start).count_nonzero() > 1
    assert torch.autograd.gradcheck(bonus, (tokens["current_entropy"].clone().requires_grad_(),))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_straight_through_has_its_own_value_and_the_gradient_of_k2(kind: Any) -> None:
    tokens = random_batch()
    found = {}
    for name, options in {
        "through": {"kind": kind, "straight_through": True},
        "value": {"kind": kind},
        "slope": {"kind": "k2"},
    }.items():
        current = current_of(tokens).requires_grad_()
        loss = penalties.divergence(current, tokens, **options)  # type: ignore[arg-type]
        found[name] = (loss.detach(), torch.autograd.grad(loss.sum(), current)[0])
    assert torch.equal(found["through"][0], found["value"][0]) and torch.equal(found["through"][1], found["slope"][1])
    assert not torch.allclose(found["value"][1], found["slope"][1], atol=1e-3)


def test_the_expected_gradient_of_k2_is_that_of_the_divergence_and_of_k1_is_nothing() -> None:
    logits, anchor = tensor([0.3, -0.5, 1.0]).requires_grad_(), tensor([0.0, 0.4, -0.2]).log_softmax(0)
    exact_loss = (logits.log_softmax(0).exp() * (logits.log_softmax(0) - anchor)).sum()
    (exact,) = torch.autograd.grad(exact_loss, logits)
    expected = {}
    for kind in ("k1", "k2", "k3"):
        logp = logits.log_softmax(0)
        loss = (logp.detach().exp() * penalties.estimate(logp - anchor, kind)).sum()  # type: ignore[arg-type]
        (expected[kind],) = torch.autograd.grad(loss, logits)
    assert torch.allclose(expected["k2"], exact, atol=1e-12) and expected["k1"].abs().max() < 1e-12
    assert not torch.allclose(expected["k3"], exact, atol=1e-2)
    logp = logits.log_softmax(0)
    weighed = (logp.detach().exp() * (logp - logp.detach()).exp() * penalties.estimate(logp - anchor, "k3")).sum()
    assert torch.allclose(torch.autograd.grad(weighed, logits)[0], exact, atol=1e-12), "with its weight k3 is right too"


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_gradients_of_pair_losses_equal_finite_differences(kind: str) -> None:
    tokens = random_batch(stale_untrained=False)
    options: dict[str, Any] = {"beta": 0.7, **({"margin": 0.5} if kind == "simpo" else {"centre": 0.1} if kind == "bco" else {})}

    def loss(current: Tensor) -> Tensor:
        return objectives.pair_loss(current, tokens, kind=kind, **options)

    assert torch.autograd.gradcheck(loss, (current_of(tokens).requires_grad_(),), atol=1e-7)


def test_gradients_of_the_value_loss_equal_finite_differences() -> None:
    tokens = random_batch()
    predicted = (tokens["value"] + 0.3 * (current_of(tokens) - tokens["proximal"]) / 0.15).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: objectives.value(v, tokens, clip=0.2), (predicted,))
    assert torch.autograd.gradcheck(lambda v: objectives.imitate(v, tokens), (predicted,))


def test_every_built_in_atom_of_the_loss_is_tested_here() -> None:
    words = {"surrogate": "surrogate", "weights": "weight", "bounds": "bounds", "ratio": "ratio", "penalties": "penalty"}
    names = {f"{word} {name}" for slot, word in words.items() for name in BUILT_IN[slot]}
    assert len(names) > 30 and names <= set(COMPOSED)


TO_COMPILE: dict[str, dict[str, Any]] = {
    "clip, mask, k3": {"weights": {"mask": {"level": "sequence_mean"}}, "penalties": {"k3": {}}},
    "geometric mean": COMPOSED["surrogate geometric_mean"],
    "hapo": {"surrogate": "hapo", "bounds": "entropy"},
    "segment, dppo": {"ratio": {"type": "segment"}, "surrogate": "dppo", "bounds": False, "weights": {"opsm": {}}},
    "sequence": {"ratio": "sequence", "surrogate": "cispo", "weights": {"tis": {"level": "sequence"}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TO_COMPILE)
def test_the_compiled_loss_agrees(name: str) -> None:
    import shutil

    if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")):
        pytest.skip("no compiler on this machine")
    atoms, tokens = algorithm(**TO_COMPILE[name]), random_batch()
    staged = stage(atoms, tokens.with_columns(current=current_of(tokens)))

    def total(current: Tensor, columns: dict[str, Tensor], chosen: Algorithm = atoms) -> Tensor:
        return policy_loss(chosen, current, TokenBatch(staged.layout, columns)).total

    found = []
    for function in (total, torch.compile(total)):
        current = current_of(tokens).requires_grad_()
        value = function(current, dict(staged.columns))
        found.append((value.detach(), torch.autograd.grad(value, current)[0]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-12) and torch.allclose(found[0][1], found[1][1], atol=1e-12)
