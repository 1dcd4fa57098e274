"""Groups -> columns over packed response tokens, and the sequences that the model reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.steps import turns
from april.core.errors import DataError
from april.core.group import Batch, Group, Reward
from april.core.ids import NO_VERSION, SampleId, Version
from april.core.sample import Sample


@dataclass(frozen=True)
class TrainingBatch:
    """The rewarded members of a batch. Failed members give no tokens and count in no statistic.

    Attributes:
        step: number of the update, for messages.
        version: weights that the update starts from.
        samples: S of them, in the order of the layout.
        rewards: S of them, as judged.
        tokens: columns (N,) on the CPU; floating ones in float64, so that statistics are exact.
        num_failed: members without a reward.
        num_left_out: rewarded members that composers keep out of training.
    """

    step: int
    version: Version
    samples: tuple[Sample, ...]
    rewards: tuple[Reward, ...]
    tokens: TokenBatch
    num_failed: int
    num_left_out: int = 0

    def ids(self, samples: torch.Tensor) -> list[SampleId]:
        """Names of some samples, for messages."""
        return [self.samples[index].id for index in samples.tolist()]


def assemble(
    batch: Batch, groups: tuple[Group, ...] | None = None, needs: Collection[str] = ("part.*", "item.*")
) -> TrainingBatch:
    """The columns of a batch.

    Args:
        batch: what to train on.
        groups: used in place of `trainable(batch, needs)`, after composers changed them.
        needs: columns that somebody reads; of those that the data name (`part.`, `item.`) only these are made, `.*` is all.

    Raises:
        DataError: a sample that cannot be trained on (greedy, truncated sampling, newer than the batch, empty).
    """
    whole = trainable(batch, needs)
    groups = whole if groups is None else groups
    members = [(index, sample, reward) for index, group in enumerate(groups) for sample, reward in group.rewarded]
    for _, sample, _ in members:
        _check_trainable(sample, batch.version)
    samples = tuple(sample for _, sample, _ in members)
    lengths = torch.tensor([len(sample) for sample in samples], dtype=torch.int64)
    layout = Layout(
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        group_of_sample=torch.tensor([index for index, _, _ in members], dtype=torch.int64),
        num_groups=len(groups),
    )
    rewards = tuple(reward for _, _, reward in members)
    columns = _columns(batch, samples, rewards, layout, needs)
    if "baseline" in needs:
        columns["baseline"] = layout.spread(_greedy_rewards(batch, groups)[layout.group_of_sample])
    return TrainingBatch(
        step=batch.step,
        version=batch.version,
        samples=samples,
        rewards=rewards,
        tokens=TokenBatch(layout, columns),
        num_failed=sum(not isinstance(outcome, Reward) for group in whole for outcome in group.outcomes),
        num_left_out=_num_rewarded(whole) - _num_rewarded(groups),
    )


def trainable(batch: Batch, needs: Collection[str]) -> tuple[Group, ...]:
    """The groups of a batch; without their greedy members where somebody needs the "baseline" that these give."""
    return tuple(group.sampled for group in batch.groups) if "baseline" in needs else batch.groups


def _num_rewarded(groups: tuple[Group, ...]) -> int:
    return sum(len(group.rewarded) for group in groups)


def _columns(
    batch: Batch, samples: tuple[Sample, ...], rewards: tuple[Reward, ...], layout: Layout, needs: Collection[str]
) -> dict[str, torch.Tensor]:
    versions = _packed([sample.versions for sample in samples], np.int64)
    mask = _packed([sample.loss_mask for sample in samples], np.bool_)
    lag = torch.where(versions == NO_VERSION, torch.zeros_like(versions), batch.version - versions)
    fresh = torch.ones_like(mask) if batch.max_token_lag is None else lag <= batch.max_token_lag
    reward = torch.tensor([reward.value for reward in rewards], dtype=torch.float64)
    columns = {
        "token_ids": _packed([sample.token_ids for sample in samples], np.int64),
        "mask": mask,
        "trained": mask & fresh,
        "behaviour": _packed([sample.behaviour_logprobs for sample in samples], np.float64),
        "temperature": _packed([_temperatures(sample) for sample in samples], np.float64),
        "lag": lag,
        "step": torch.full_like(lag, batch.step),
        "reward": layout.spread(reward),
        "correct": layout.spread(torch.tensor([float(reward.correct) for reward in rewards], dtype=torch.float64)),
        "finished": layout.spread(torch.tensor([sample.stop != "length" for sample in samples], dtype=torch.bool)),
    }
    if {"turn", "anchor"} & set(needs):
        columns |= turns(columns["token_ids"], _packed([_environment(sample) for sample in samples], np.bool_), layout)
    columns |= _named("part", lambda: [reward.parts for reward in rewards], layout, needs)
    columns |= _named("item", lambda: [sample.prompt.item for sample in samples], layout, needs)
    if any(sample.entropies is not None for sample in samples):
        unknown = [np.full(len(sample), np.nan) if sample.entropies is None else sample.entropies for sample in samples]
        columns["entropy"] = _packed(unknown, np.float64)
    return columns


def _named(
    prefix: str, tables: Callable[[], list[Mapping[str, Any]]], layout: Layout, needs: Collection[str]
) -> dict[str, torch.Tensor]:
    """Numbers that samples bring under names, as columns, those that are needed; nan where a sample has none of that name."""
    asked = {name.removeprefix(f"{prefix}.") for name in needs if name.startswith(f"{prefix}.")}
    if not asked:
        return {}
    numbers = [
        {
            name: float(value)
            for name, value in table.items()
            if ("*" in asked or name in asked) and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for table in tables()
    ]
    names = sorted(set().union(*numbers) | (asked - {"*"}))
    return {
        f"{prefix}.{name}": layout.spread(torch.tensor([table.get(name, math.nan) for table in numbers], dtype=torch.float64))
        for name in names
    }


def _greedy_rewards(batch: Batch, groups: tuple[Group, ...]) -> torch.Tensor:
    """float64 (G,): mean reward of the greedy members that each of `groups` has in the batch; nan where there are none."""
    greedy = {group.id: [reward.value for sample, reward in group.rewarded if sample.spec.greedy] for group in batch.groups}
    means = [sum(values) / len(values) if (values := greedy[group.id]) else math.nan for group in groups]
    return torch.tensor(means, dtype=torch.float64)


def _temperatures(sample: Sample) -> np.ndarray:
    """float64 (T,): what each token was drawn at, which follows from its entropy where the temperature is adaptive."""
    base = np.full(len(sample), sample.spec.temperature)
    if sample.spec.adaptive is None or sample.entropies is None:
        return base
    return base * sample.spec.adaptive.factors(sample.entropies)


def _environment(sample: Sample) -> np.ndarray:
    """bool (T,): tokens of an environment."""
    out = np.zeros(len(sample), np.bool_)
    for span in sample.spans:
        if span.origin == "environment":
            out[span.start : span.end] = True
    return out


def _packed(pieces: list[np.ndarray], dtype: type[np.generic]) -> torch.Tensor:
    packed = np.concatenate(pieces) if pieces else np.zeros(0)
    return torch.from_numpy(packed.astype(dtype))


def _check_trainable(sample: Sample, version: int) -> None:
    where, spec = str(sample.id), sample.spec
    if len(sample) == 0:
        raise DataError("a rewarded sample has no tokens", where=where)
    if spec.greedy:
        raise DataError("greedy samples cannot be trained on", where=where, got="temperature 0", expected="above 0")
    if spec.truncates:
        raise DataError(
            "training on truncated sampling is refused unless the kept set is stored",
            where=where,
            got=f"top_p {spec.top_p}, top_k {spec.top_k}",
            expected="top_p 1 and top_k 0",
        )
    versions = sample.versions
    if (versions > version).any():
        raise DataError(
            "a token is newer than the weights it trains", where=where, got=int(versions.max()), expected=f"<= {version}"
        )
    if (sample.loss_mask & (versions == NO_VERSION)).any():
        raise DataError("a token that no policy sampled cannot be trained on", where=where, expected="loss_mask False")
