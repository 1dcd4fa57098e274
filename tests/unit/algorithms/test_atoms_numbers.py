"""Every formula against literal numbers, each with a variant that must differ."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from april.algorithms.advantages.adjust import whiten
from april.algorithms.advantages.group import group_relative, leave_one_out
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.losses import aggregate, bounds, penalties, ratio, surrogate, weights
from april.algorithms.rewards.length import overlong
from april.core.errors import DataError

F64 = torch.float64


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=F64)


def batch_of(lengths: Sequence[int], groups: Sequence[int], **columns: Sequence[float] | Tensor) -> TokenBatch:
    """Columns over samples of these lengths; "mask" and "trained" are all True unless given."""
    size = torch.tensor(lengths)
    layout = Layout(torch.cat([size.new_zeros(1), size.cumsum(0)]), torch.tensor(groups), max(groups) + 1)
    full = {name: column if isinstance(column, Tensor) else tensor(column) for name, column in columns.items()}
    mask = full.pop("mask", torch.ones(layout.num_tokens)).bool()
    return TokenBatch(layout, {"mask": mask, "trained": mask, **full})


def rewards_of(rewards: Sequence[float], groups: Sequence[int]) -> TokenBatch:
    """One token a sample."""
    return batch_of([1] * len(rewards), groups, reward=rewards)


def close(got: Tensor, expected: Sequence[float], tolerance: float = 1e-6) -> bool:
    return bool(torch.allclose(got.double(), tensor(expected), atol=tolerance, rtol=0))


def test_layout_segments_by_hand() -> None:
    tokens = batch_of([3, 2, 2], [0, 0, 1], x=[1, 2, 3, 4, 5, 6, 7])
    layout = tokens.layout
    assert layout.sample_of_token.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert layout.sum(tokens["x"]).tolist() == [6, 9, 13]
    assert layout.mean(tokens["x"], torch.tensor([1, 0, 1, 1, 1, 0, 0]).bool()).tolist() == [2, 4.5, 0]
    assert layout.first(tokens["x"]).tolist() == [1, 4, 6]
    assert layout.group_sum(tensor([1, 2, 3])).tolist() == [3, 3]


def test_take_keeps_whole_samples_in_the_asked_order() -> None:
    part = batch_of([3, 2, 2], [0, 0, 1], x=[1, 2, 3, 4, 5, 6, 7]).take(torch.tensor([2, 0]))
    assert part["x"].tolist() == [6, 7, 1, 2, 3]
    assert part.layout.offsets.tolist() == [0, 2, 5] and part.layout.group_of_sample.tolist() == [1, 0]


def test_a_missing_column_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'reward'") as error:
        rewards_of([1], [0])["rewards"]
    assert "rewards" in str(error.value)


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match="does not fit") as error:
        rewards_of([1, 2], [0, 0]).with_columns(x=tensor([1, 2, 3]))
    assert "(3,)" in str(error.value)


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("sample", [0.999998, -0.999998, 0.0, -0.70710478, 0.70710478]),
        ("population", [1.22474186, -1.22474186, 0.0, -0.999996, 0.999996]),
        ("none", [0.5, -0.5, 0.0, -0.25, 0.25]),
    ],
)
def test_group_relative(std: str, expected: list[float]) -> None:
    tokens = rewards_of([1, 0, 0.5, 0.25, 0.75], [0, 0, 0, 1, 1])
    assert close(group_relative(tokens, std=std), expected)  # type: ignore[arg-type]
    pooled = rewards_of([1, 0, 0.5, 0.25, 0.75], [0, 1, 0, 1, 1])
    assert not close(group_relative(pooled, std=std), expected, 1e-2)  # type: ignore[arg-type]


def test_group_relative_is_exactly_zero_without_siblings_or_spread() -> None:
    tokens = rewards_of([0.1, 0.1, 0.1, 0.7], [0, 0, 0, 1])
    assert group_relative(tokens).tolist() == [0, 0, 0, 0]
    nearly = rewards_of([0.1, 0.1, 0.1001, 0.7], [0, 0, 0, 1])
    assert group_relative(nearly)[2] > 1


def test_group_statistics_do_not_depend_on_lengths_or_order() -> None:
    tokens = batch_of([3, 1, 2], [1, 0, 1], reward=[1, 1, 1, 5, 0, 0])
    assert close(group_relative(tokens, std="none"), [0.5, 0.5, 0.5, 0, -0.5, -0.5])


def test_group_relative_shift_and_scale() -> None:
    rewards, groups = [1.0, 0.0, 0.5, 0.25, 0.75], [0, 0, 0, 1, 1]
    moved = [3 * r + 7 for r in rewards]
    assert close(group_relative(rewards_of(moved, groups)), group_relative(rewards_of(rewards, groups)).tolist(), 1e-5)
    unscaled = group_relative(rewards_of(rewards, groups), std="none").tolist()
    assert not close(group_relative(rewards_of(moved, groups), std="none"), unscaled, 1e-2)


def test_leave_one_out() -> None:
    tokens = rewards_of([1, 0, 0.5, 0.25, 0.75, 9], [0, 0, 0, 1, 1, 2])
    assert close(leave_one_out(tokens), [0.75, -0.75, 0.0, -0.5, 0.5, 0.0])
    assert not close(group_relative(tokens, std="none"), [0.75, -0.75, 0.0, -0.5, 0.5, 0.0], 1e-2)


def test_whiten_over_the_mask() -> None:
    tokens = batch_of([2, 2], [0, 0], mask=[1, 1, 1, 0])
    assert close(whiten(tensor([1, 2, 3, 100]), tokens), [-1, 0, 1, 0])
    assert close(whiten(tensor([1, 2, 3, 100]), tokens, shift=False), [1, 2, 3, 0])
    single = batch_of([2], [0], mask=[1, 0])
    assert whiten(tensor([5, 5]), single).tolist() == [5, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_whiten_gives_a_batch_that_agrees_exactly_nothing(dtype: torch.dtype, eps: float) -> None:
    tokens = batch_of([7], [0])
    alike = torch.full((7,), 0.1, dtype=dtype) * 3
    assert torch.equal(whiten(alike, tokens, eps=eps), torch.zeros(7, dtype=dtype))
    apart = whiten(alike + 1e-2 * torch.arange(7), tokens, eps=eps)
    assert float(apart.var()) == pytest.approx(1, abs=1e-3)


def test_overlong() -> None:
    lengths = [100, 950, 1000, 1100, 1500]
    reward = torch.cat([torch.full((n,), r, dtype=F64) for n, r in zip(lengths, [1, 1, 0, 1, 1], strict=True)])
    tokens = batch_of(lengths, [0] * 5, reward=reward)
    changed = tokens.layout.first(overlong(tokens, max_tokens=1100, buffer_tokens=200))
    assert close(changed, [1, 0.75, -0.5, 0, 0])
    assert close(
        tokens.layout.first(overlong(tokens, max_tokens=1100, buffer_tokens=200, factor=0.5)), [1, 0.875, -0.25, 0.5, 0.5]
    )


def test_token_ratio_and_its_clamp() -> None:
    tokens = batch_of([3], [0])
    assert ratio.token(tensor([-1, -2, 0]), tensor([-1.5, -1, -90]), tokens).tolist() == [0.5, -1, 20]


def test_sequence_ratio_has_the_mean_as_value_and_each_token_as_gradient() -> None:
    tokens = batch_of([2, 1], [0, 0], mask=[1, 1, 1])
    current = tensor([-0.5, -1.2, -1.0]).requires_grad_()
    log_ratio = ratio.sequence(current, tensor([-0.7, -1.0, -1.5]), tokens)
    assert close(log_ratio.detach(), [0, 0, 0.5])
    (gradient,) = torch.autograd.grad((log_ratio * tensor([1, 10, 100])).sum(), current)
    assert gradient.tolist() == [1, 10, 100]
    hidden = batch_of([2, 1], [0, 0], mask=[1, 0, 1])
    assert close(ratio.sequence(current, tensor([-0.7, -1.0, -1.5]), hidden).detach(), [0.2, 0.2, 0.5])


def test_clip_values_gradients_and_clipped_flags() -> None:
    tokens = batch_of([4], [0], advantage=[1, 1, -1, -1])
    log_ratio = tensor([1.5, 0.5, 0.5, 1.5]).log().requires_grad_()
    loss, clipped = surrogate.clip(log_ratio, log_ratio, tokens["advantage"], bounds.constant(tokens), tokens)
    assert close(loss.detach(), [-1.2, -0.5, 0.8, 1.5])
    assert clipped.tolist() == [True, False, True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert close(gradient, [0, -0.5, 0, 1.5])
    higher, _ = surrogate.clip(log_ratio, log_ratio, tokens["advantage"], bounds.constant(tokens, low=0.8, high=1.28), tokens)
    assert close(higher.detach(), [-1.28, -0.5, 0.8, 1.5])


def test_dual_clip_bounds_negative_advantages_only() -> None:
    log_ratio, advantage = tensor([5.0]).log(), tensor([-1])
    limits, tokens = (tensor([0.8]), tensor([1.28])), batch_of([1], [0])
    assert surrogate.clip(log_ratio, log_ratio, advantage, limits, tokens, dual_clip=3.0)[0].tolist() == [3]
    assert close(surrogate.clip(log_ratio, log_ratio, advantage, limits, tokens)[0], [5])
    positive, _ = surrogate.clip(-log_ratio, log_ratio, -advantage, limits, tokens, dual_clip=3.0)
    assert close(positive, [-0.2])


def test_plain_is_the_score_function() -> None:
    loss, clipped = surrogate.plain(tensor([9, 9]), tensor([-0.5, -2]), tensor([2, -1]), None, batch_of([2], [0]))
    assert loss.tolist() == [1, -2] and not clipped.any()


def test_truncated_weights() -> None:
    columns = {"proximal": [-1, -1, -1, -2], "behaviour": [-1, -1.5, -3, -1]}
    tokens = batch_of([2, 2], [0, 0], **columns)
    assert close(weights.truncated(tokens), [1, 1.64872127, 2, 0.36787944])
    assert close(weights.truncated(tokens, low=0.5), [1, 1.64872127, 2, 0.5])
    assert close(weights.truncated(tokens, cap=100), [1, 1.64872127, 7.3890561, 0.36787944])
    assert close(weights.truncated(tokens, level="sequence"), [1.64872127, 1.64872127, 2, 2])


def test_masked_weights_drop_what_truncation_would_keep() -> None:
    tokens = batch_of([2, 2], [0, 0], proximal=[-1, -1, -1, -2], behaviour=[-1, -1.5, -3, -1])
    assert close(weights.masked(tokens, low=0.5, high=2), [1, 1.64872127, 0, 0])
    assert close(weights.masked(tokens, low=0.5, high=1.5, level="sequence_mean"), [1, 1.64872127, 0, 0])
    assert not close(weights.truncated(tokens), [1, 1.64872127, 0, 0], 1e-2)


def test_weights_carry_no_gradient_and_ignore_tokens_outside_the_mask() -> None:
    proximal = tensor([-1, -1]).requires_grad_()
    tokens = batch_of([2], [0], mask=[1, 0], behaviour=[-1.5, float("-inf")]).with_columns(proximal=proximal)
    for weight in (weights.truncated(tokens), weights.masked(tokens)):
        assert not weight.requires_grad and close(weight, [1.64872127, 1])


def test_penalties() -> None:
    current = tensor([-0.5, -1.2, -2.0])
    tokens = batch_of([3], [0], reference=[-0.8, -1.1, -1.4])
    assert close(penalties.k3(current, tokens), [0.04081822, 0.00517092, 0.2221188])
    assert close(penalties.k2(current, tokens), [0.045, 0.005, 0.18])
    far = batch_of([1], [0], reference=[0])
    assert penalties.k3(tensor([-100]), far).tolist() == [10]


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        (aggregate.token_mean, {}, 1.0),
        (aggregate.sequence_mean, {}, 1.0),
        (aggregate.sequence_sum, {}, 10 / 3),
        (aggregate.fixed_length, {"constant": 4}, 10 / 12),
    ],
)
def test_aggregates_leave_out_what_is_masked(function, options, expected) -> None:  # type: ignore[no-untyped-def]
    loss = tensor([1, 2, 3, 9, 1, 1, 1, 1, 5, 5, 5, 5, 0.5, 0, -0.5, 9])
    mask = [1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]
    tokens = batch_of([4, 4, 4, 4], [0, 0, 1, 1], mask=mask)
    assert float((function(tokens, **options) * loss).sum()) == pytest.approx(expected, abs=1e-12)
    unmasked = batch_of([4, 4, 4, 4], [0, 0, 1, 1])
    assert float((function(unmasked, **options) * loss).sum()) != pytest.approx(expected, abs=1e-2)


def test_aggregates_differ_where_lengths_do() -> None:
    loss, tokens = tensor([1, 1, 1, 5]), batch_of([3, 1], [0, 0])
    values = [float((f(tokens) * loss).sum()) for f in (aggregate.token_mean, aggregate.sequence_mean, aggregate.sequence_sum)]
    assert values == pytest.approx([2.0, 3.0, 4.0])


def test_aggregates_of_nothing_are_zero() -> None:
    tokens = batch_of([2], [0], mask=[0, 0])
    shares = [aggregate.token_mean(tokens), aggregate.sequence_mean(tokens), aggregate.fixed_length(tokens, constant=3)]
    assert all(share.tolist() == [0, 0] for share in shares)
