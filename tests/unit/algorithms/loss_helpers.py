"""Batches with every column, for the tests of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.losses.compose import Algorithm, Loss, credit, policy_loss, stage
from april.algorithms.spec import AlgorithmConfig
from april.config.load import read_preset

F64 = torch.float64


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=F64)


def layout_of(lengths: Sequence[int], groups: Sequence[int]) -> Layout:
    size = torch.tensor(lengths)
    return Layout(torch.cat([size.new_zeros(1), size.cumsum(0)]), torch.tensor(groups), max(groups) + 1)


def batch_of(lengths: Sequence[int], groups: Sequence[int], **columns: Sequence[float] | Tensor) -> TokenBatch:
    """Columns over samples of these lengths; "mask" and "trained" are all True unless given."""
    layout = layout_of(lengths, groups)
    full = {name: column if isinstance(column, Tensor) else tensor(column) for name, column in columns.items()}
    mask = full.pop("mask", torch.ones(layout.num_tokens)).bool()
    return TokenBatch(layout, {"mask": mask, "trained": full.pop("trained", mask).bool(), **full})


def random_batch(seed: int = 0, *, fresh: bool = False, stale_untrained: bool = True) -> TokenBatch:
    """Two groups of three samples with every column that a loss may read; fresh: one policy everywhere."""
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of([3, 5, 1, 4, 2, 6], [0, 0, 0, 1, 1, 1])
    size = layout.num_tokens

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=F64)

    proximal = -2 * torch.rand(size, generator=generator, dtype=F64) - 0.1
    mask = torch.rand(size, generator=generator) > 0.2
    trained = mask & (torch.rand(size, generator=generator) > 0.2) if stale_untrained and not fresh else mask
    behaviour = proximal if fresh else proximal + noise(0.4)
    reward = layout.spread(tensor([1, 0, 0.5, 0, 1, 1]))
    return TokenBatch(
        layout,
        {
            "mask": mask,
            "trained": trained,
            "proximal": proximal,
            "behaviour": behaviour,
            "reference": proximal + noise(0.3),
            "current_entropy": noise(0.1) + 1,
            "entropy": noise(0.3).abs(),
            "entropy_score": noise(0.5).clamp(-1, 1),
            "advantage": layout.spread(tensor([1.0, -1, 0.2, -1.2, 0.6, 0.6])),
            "reward": reward,
            "correct": (reward > 0.4).to(F64),
            "value": noise(0.5),
            "return": reward,
            "finished": torch.ones(size, dtype=torch.bool),
            "lag": torch.zeros(size, dtype=torch.int64),
            "step": torch.full((size,), 60, dtype=torch.int64),
            "token_ids": torch.randint(0, 50, (size,), generator=generator),
        },
    )


def algorithm(**options: object) -> Algorithm:
    return Algorithm.of(AlgorithmConfig.model_validate(options))


def preset(name: str, **changes: Any) -> Algorithm:
    """The algorithm of a preset file."""
    return algorithm(**{**read_preset(name)[0], **changes})


def step_loss(atoms: Algorithm, tokens: TokenBatch, current: Tensor, *, credited: bool = True) -> tuple[Loss, Tensor]:
    """The loss of a whole optimiser step and its gradient by `current`; `credited`: keep the batch's own advantage."""
    now = current.detach()
    tokens = tokens if credited else credit(atoms, tokens)
    staged = stage(atoms, tokens.with_columns(current=now))
    leaf = now.clone().requires_grad_()
    loss = policy_loss(atoms, leaf, staged)
    (gradient,) = torch.autograd.grad(loss.total, leaf, allow_unused=True, retain_graph=True)
    return loss, torch.zeros_like(leaf) if gradient is None else gradient
