"""Rewards that compare samples with those of other prompts of the same query, and with the policy they depart from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.penalties import Kind, estimate

_HASH = np.uint64(0x9E3779B97F4A7C15)


def reference_kl(
    tokens: TokenBatch, *, coefficient: float = 0.001, level: Literal["sequence", "token"] = "sequence", kind: Kind = "k1"
) -> Tensor | dict[str, Tensor]:
    """R - coefficient * sum of an estimate of the divergence from the reference policy: it is paid in the reward.

    With d = behaviour - reference of the tokens that the behaviour policy sampled, nothing flows back through the estimate.
    That of k1, d itself, makes the expected gradient that of the divergence; the others have less variance and another one.

    Source: RLHF (arXiv 2203.02155), equation 2, with k1; per token: PPO implementations of it; estimates: Schulman 2020.

    Args:
        tokens: needs "reward", "behaviour", "reference", "mask".
        coefficient: of the divergence.
        level: "sequence" changes the sample's reward; "token" gives each token its own part, for advantages that read
            "token_reward".
        kind: which estimate (`april.algorithms.losses.penalties.estimate`).

    Returns:
        (N,) rewards, or the column "token_reward" (N,).
    """
    difference = tokens["behaviour"] - tokens["reference"]
    each = estimate(torch.where(tokens["mask"], difference, torch.zeros_like(difference)), kind)
    if level == "sequence":
        return tokens["reward"] - coefficient * tokens.layout.spread(tokens.layout.sum(each))
    before = tokens["token_reward"] if "token_reward" in tokens else torch.zeros_like(each)
    return {"token_reward": before - coefficient * each}


def group_similarity(
    tokens: TokenBatch, *, query: str = "item.query", weight: float = 1.0, keep: float = 0.0, max_ngram: int = 4
) -> Tensor:
    """R = keep * R + weight * mean similarity to the samples of the other prompts of the same query.

    Similarity is that of `overlaps`. A sample without any counterpart in the batch gets 0 for it.

    Source: PS-GRPO, Con-RAG (arXiv 2510.04392), equation 3, which uses BLEU.

    Args:
        tokens: needs "reward", "token_ids", "mask" and the column of queries.
        query: column with a number that prompts asking the same have in common.
        weight, keep: of the similarity and of the reward as it was.
        max_ngram: longest n-gram that is compared.

    Returns:
        (N,).
    """
    layout = tokens.layout
    queries, groups = layout.first(tokens[query]).tolist(), layout.group_of_sample.tolist()
    offsets, ids, mask = layout.offsets.tolist(), tokens["token_ids"].numpy(), tokens["mask"].numpy()
    members: dict[float, list[int]] = {}
    for sample, name in enumerate(queries):
        if name == name:  # not nan
            members.setdefault(name, []).append(sample)
    reward = np.zeros(layout.num_samples)
    for mine in members.values():
        similarity = overlaps([ids[a:b][mask[a:b]] for a, b in ((offsets[s], offsets[s + 1]) for s in mine)], max_ngram)
        reward[mine] = mean_across(similarity, np.asarray([groups[sample] for sample in mine]))
    shaped = torch.from_numpy(reward).to(tokens["reward"].dtype)
    return keep * tokens["reward"] + weight * layout.spread(shaped)


def self_prediction(
    tokens: TokenBatch,
    *,
    query: str = "item.query",
    meta: str = "item.meta",
    num_passes: str = "part.num_passes",
    length: str = "part.length_tokens",
    num_rollouts: int = 8,
    base: float = 0.01,
) -> Tensor:
    """Predictions about own solutions earn their agreement with the solutions to the same query in the batch.

    The reward of a prediction is the mean of base ** |predicted - true pass rate| and of 1 where the predicted length lies
    strictly between those of the right solutions; 0 when it could not be read. Solutions keep their reward, and so do
    predictions about a query without solutions in the batch.

    Source: MASA (arXiv 2510.03259), without its part for notions, which needs texts:
    `april.rewards.meta.MetaPredictionReward` has it, for recorded solutions.

    Args:
        tokens: needs "reward", "correct" and the columns below.
        query: column with a number that the prompts for solutions and for predictions have in common.
        meta: column that is above 0.5 where a prediction is asked for.
        num_passes, length: columns with what was predicted.
        num_rollouts: solutions that the predicted number of passes is out of.
        base: reward of a pass rate that is wrong by 1.

    Returns:
        (N,).
    """
    layout = tokens.layout
    names, asked = layout.first(tokens[query]), layout.first(tokens[meta]) > 0.5
    reward, correct = layout.first(tokens["reward"]).clone(), layout.first(tokens["correct"]) > 0.5
    passes, lengths = layout.first(tokens[num_passes]), layout.first(tokens[length])
    for name in sorted(set(names[asked & ~names.isnan()].tolist())):
        solutions, predictions = (names == name) & ~asked, (names == name) & asked
        if not bool(solutions.any()):
            continue
        right = layout.lengths[solutions & correct].to(reward.dtype)
        rate = correct[solutions].to(reward.dtype).mean()
        hit = base ** (passes[predictions] / num_rollouts - rate).abs()
        between = torch.zeros_like(hit)
        if len(right):
            between = ((lengths[predictions] > right.min()) & (lengths[predictions] < right.max())).to(reward.dtype)
        reward[predictions] = ((hit + between) / 2).nan_to_num(0.0)
    return layout.spread(reward)


def mean_across(similarity: npt.NDArray[np.float64], group: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean similarity of each sample (n,) to those of other groups; 0 where there are none.

    Source: PS-GRPO (arXiv 2510.04392), equation 3.

    Args:
        similarity: (n, n), symmetric.
        group: (n,).
    """
    others = group[:, None] != group[None, :]
    mean: npt.NDArray[np.float64] = (similarity * others).sum(1) / np.maximum(others.sum(1), 1)
    return mean


def overlaps(texts: Sequence[npt.NDArray[np.int64]], longest: int = 4) -> npt.NDArray[np.float64]:
    """Similarity (n, n) of token sequences: 2 * common / all n-grams, averaged over the lengths of n that either text has.

    In [0, 1], symmetric, 1 for equal texts.

    Args:
        texts: n sequences of token ids.
        longest: n-grams of lengths from 1 to this.
    """
    size = len(texts)
    total, lengths = np.zeros((size, size)), np.zeros((size, size))
    for n in range(1, longest + 1):
        counts = ngram_counts(texts, n)
        every = counts.sum(1)[:, None] + counts.sum(1)[None, :]
        common = np.stack([np.minimum(counts[row], counts).sum(1) for row in range(size)]) if size else every
        total += 2 * common / np.maximum(every, 1)
        lengths += every > 0
    return np.where(lengths > 0, total / np.maximum(lengths, 1), 1.0)


def ngram_counts(texts: Sequence[npt.NDArray[np.int64]], n: int) -> npt.NDArray[np.int32]:
    """How often each n-gram that occurs in any text occurs in each (texts, n-grams); n-grams are told apart by a 64-bit hash."""
    hashed = []
    for text in texts:
        ids, width = np.asarray(text).astype(np.uint64), max(len(text) - n + 1, 0)
        grams = np.zeros(width, np.uint64)
        for shift in range(n):
            grams = (grams ^ ids[shift : shift + width]) * _HASH
            grams ^= grams >> np.uint64(29)
        hashed.append(grams)
    names, column = np.unique(np.concatenate(hashed) if hashed else np.zeros(0, np.uint64), return_inverse=True)
    row = np.repeat(np.arange(len(texts)), [len(grams) for grams in hashed])
    counts = np.bincount(row * len(names) + column, minlength=len(texts) * len(names))
    return counts.reshape(len(texts), len(names)).astype(np.int32)
