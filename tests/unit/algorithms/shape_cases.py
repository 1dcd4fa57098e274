"""Batches and groups for the tests of shaping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.spec import SLOTS
from april.core.group import Failure, Group, Outcome, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec

F64 = torch.float64


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=F64)


def tokens_of(lengths: Sequence[int], groups: Sequence[int], mask: Sequence[int] | None = None, **columns: Any) -> TokenBatch:
    """Columns over samples of these lengths: one number a sample is spread, one a token is taken as it is."""
    size = torch.tensor(lengths, dtype=torch.int64)
    layout = Layout(torch.cat([size.new_zeros(1), size.cumsum(0)]), torch.tensor(groups, dtype=torch.int64), len(set(groups)))
    inside = torch.ones(layout.num_tokens, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    full = {"reward": [0.0] * len(lengths), "correct": [0.0] * len(lengths), **columns}
    made = {}
    for name, values in full.items():
        column = torch.as_tensor(values) if name == "token_ids" else torch.as_tensor(values, dtype=F64)
        made[name] = column if len(column) == layout.num_tokens else layout.spread(column)
    return TokenBatch(layout, {"mask": inside, "trained": inside, **made})


def random_tokens(seed: int = 0) -> TokenBatch:
    """Three groups of four samples with every column that shaping reads; some tokens are masked, some entropies unknown."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (12,), generator=generator).tolist()
    size = sum(lengths)

    def noise(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=F64)

    correct = (noise(12) > 0.5).double()
    correct[:2] = tensor([0, 1])
    entropy = noise(size) * 2
    entropy[3] = torch.nan
    behaviour = -noise(size)
    columns = {
        "reward": correct + 0.1 * noise(12),
        "correct": correct,
        "finished": (noise(12) > 0.2).double(),
        "token_ids": torch.randint(0, 5, (size,), generator=generator),
        "entropy": entropy,
        "behaviour": behaviour,
        "reference": behaviour - 0.2 * noise(size),
        "advantage": noise(size) - 0.5,
        "part.cost": noise(12),
        "part.time_s": 1 + noise(12),
        "part.flawed": (noise(12) > 0.5).double(),
        "part.format": (noise(12) > 0.3).double(),
        "part.compiled": (noise(12) > 0.3).double(),
        "part.ran": (noise(12) > 0.3).double(),
        "item.reference_time_s": 1 + noise(12),
        "item.baseline_time_s": 1 + noise(12),
        "item.baseline_passes": (noise(12) > 0.5).double(),
        "item.budget": tensor([2, 2, 4, 4] * 3),
        "part.num_passes": (noise(12) * 8).round(),
        "part.length_tokens": 2 + 4 * noise(12),
        "item.meta": tensor([0, 0, 0, 1] * 3),
        "item.query": tensor([1] * 8 + [2] * 4),
    }
    mask = (noise(size) > 0.2).int()
    mask[torch.tensor(lengths).cumsum(0) - 1] = 1
    return tokens_of(lengths, [0] * 4 + [1] * 4 + [2] * 4, mask=mask.tolist(), **columns)


def atoms_of(slot: str) -> list[Any]:
    """Every built-in atom of shaping of a slot, with options under which it acts on `random_tokens`."""
    options: Mapping[str, Mapping[str, Any]] = {
        "overlong": {"max_tokens": 6, "buffer_tokens": 4},
        "weighted_parts": {"weights": {"part.format": 2.0, "part.cost": -1.0}},
        "shorter_is_better": {"format_part": "part.format"},
        "budget": {"scale_tokens": 8},
        "budget_gap": {"scale_tokens": 8},
        "cost_blend": {"format_part": "part.format"},
        "top_tokens": {"renormalise": True},
    }
    made = [entry.config(**options.get(name, {})) for name, entry in sorted(SLOTS[slot].items())]
    return [atom for atom in made if atom.needs <= set(random_tokens().columns)]


def group_of(
    outcomes: Sequence[Outcome | tuple[float, bool] | tuple[float, bool, Mapping[str, float]]],
    serial: int = 0,
    item: Mapping[str, Any] | None = None,
) -> Group:
    """A group with one sample of one token for each outcome."""
    id = GroupId(serial, 0, f"p{serial}")
    prompt = Prompt(id.prompt, [1], "", item or {})  # type: ignore[arg-type]
    samples = [
        Sample(id.member(index), prompt, SamplingSpec(1)).extended(Segment([5], [-0.5], 0)) for index in range(len(outcomes))
    ]
    rewards = [one if isinstance(one, Reward | Failure) else Reward(*one) for one in outcomes]
    return Group(id, tuple(sample.finished("eos") for sample in samples), tuple(rewards))
