"""Credit in trees of samples that share prefixes; the trees are read off the tokens, whoever sampled them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.advantages.statistics import Scale, joined, normalised
from april.algorithms.columns import TokenBatch
from april.algorithms.prefix_tree import PrefixTree, prefix_tree, segments

Shared = Literal["each", "once"]


def tree_of(tokens: TokenBatch, segment_tokens: int, delimiter_ids: tuple[int, ...]) -> PrefixTree:
    """The prefix tree of a batch; see `april.algorithms.prefix_tree.segments`."""
    ids, layout = tokens["token_ids"], tokens.layout
    return prefix_tree(ids, layout, segments(ids, layout, segment_tokens=segment_tokens, delimiter_ids=delimiter_ids))


def subgroups(
    tokens: TokenBatch,
    *,
    strategy: Literal["average", "group_size"] = "average",
    segment_tokens: int = 512,
    delimiter_ids: tuple[int, ...] = (),
    singleton: Literal["zero", "raw"] = "zero",
) -> Tensor:
    """A = mean over ancestors d of (R - mean reward of the samples below d), by default or weighted with their number.

    Ancestors that have only this sample below them do not count. Followed by `whiten` in the source.

    Source: TreePO (Li et al. 2025, arXiv 2508.17445) subgroup advantage.

    Args:
        tokens: needs "reward" and "token_ids".
        strategy: mean of the ancestors, or weighted by the samples below them.
        segment_tokens: tokens of a node.
        delimiter_ids: nodes begin at these tokens instead.
        singleton: what a sample without siblings gets: 0, or its reward.

    Returns:
        (N,).
    """
    tree = tree_of(tokens, segment_tokens, delimiter_ids)
    counted = tree.num_samples[tree.node] > 1
    return tokens.layout.spread(over_ancestors(tokens, tree, counted, strategy, singleton))


def over_ancestors(
    tokens: TokenBatch, tree: PrefixTree, counted: Tensor, strategy: str, singleton: Literal["zero", "raw"] = "zero"
) -> Tensor:
    """(S,): mean over the root and the counted ancestors of the reward relative to their samples."""
    layout = tokens.layout
    reward = layout.first(tokens["reward"])
    root = normalised(reward, layout.group_of_sample, layout.num_groups, singleton=singleton)
    relative = normalised(reward[tree.sample], tree.node, len(tree.depth))
    weight = counted.to(reward.dtype)
    root_weight = torch.ones_like(reward)
    if strategy == "group_size":
        weight = weight * tree.num_samples[tree.node]
        root_weight = layout.group_sum(root_weight)[layout.group_of_sample]
    total = (root_weight * root).index_add(0, tree.sample, weight * relative)
    return total / root_weight.index_add(0, tree.sample, weight)


def segment_gain(
    tokens: TokenBatch, *, segment_tokens: int = 512, delimiter_ids: tuple[int, ...] = (), shared: Shared = "each"
) -> Tensor:
    """A of a segment = value of its node - value of its parent; the root's value is 0.

    A leaf's value is its reward relative to each ancestor's samples, weighted by their number; an inner node's value is the
    mean of its children's.

    Source: TreePO (Li et al. 2025, arXiv 2508.17445), segment-level baseline of the release.

    Args:
        tokens: needs "reward" and "token_ids".
        segment_tokens: tokens of a node.
        delimiter_ids: nodes begin at these tokens instead.
        shared: a node's credit goes to each of the samples that share it, as published, or once to all together.

    Returns:
        (N,).
    """
    tree = tree_of(tokens, segment_tokens, delimiter_ids)
    every = torch.ones_like(tree.node, dtype=torch.bool)
    value = fused(tree, over_ancestors(tokens, tree, every, "group_size"))
    above = torch.where(tree.parent >= 0, value[tree.parent], torch.zeros_like(value))
    return _to_tokens(value - above, tree, shared)


def _to_tokens(credit: Tensor, tree: PrefixTree, shared: Shared) -> Tensor:
    """(M,) -> (N,)."""
    return (credit / tree.num_samples if shared == "once" else credit)[tree.node_of_token]


def fused(tree: PrefixTree, leaf_values: Tensor, edge_logprobs: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """(M,): values of leaves, carried up. A node's value is the mean of its children's, or weighted by softmax of their edges.

    Args:
        tree: of S samples and M nodes.
        leaf_values: (S,).
        edge_logprobs: (M,), log-prob of each node's tokens given its parent; None for the mean. A sample that ends where
            others go on counts as a child with log-prob 0.
        temperature: divides the log-probs.
    """
    ended = torch.bincount(tree.leaf, minlength=len(tree.depth)).to(leaf_values.dtype)
    edge = torch.zeros_like(ended) if edge_logprobs is None else edge_logprobs / temperature
    inner = tree.parent >= 0
    highest = torch.where(ended > 0, torch.zeros_like(edge), torch.full_like(edge, -torch.inf))
    highest = highest.scatter_reduce(0, tree.parent[inner], edge[inner], "amax")
    weight = torch.where(inner, (edge - highest[tree.parent]).exp(), torch.zeros_like(edge))
    own = torch.where(ended > 0, (-highest).exp(), torch.zeros_like(edge))
    total = torch.zeros_like(ended).index_add(0, tree.leaf, leaf_values) * own
    norm = ended * own
    for level in reversed(tree.levels()):
        total[level] /= norm[level]
        above = tree.parent[level]
        if level.start > 0:
            total.index_add_(0, above, weight[level] * total[level])
            norm.index_add_(0, above, weight[level])
    return total


def depthwise(
    tokens: TokenBatch,
    *,
    fusion: Literal["mean", "softmax"] = "mean",
    temperature: float = 1.0,
    limit: float = 5.0,
    eps: float = 1e-8,
    segment_tokens: int = 512,
    delimiter_ids: tuple[int, ...] = (),
    shared: Shared = "each",
) -> Tensor:
    """A of a segment = (fused reward of its node - mean) / (std + eps) over the group's nodes of the same depth, clipped.

    Source: BranchGRPO (Li et al. 2025, arXiv 2509.06040) depth-wise estimator; there a node is a run of denoising steps.

    Args:
        tokens: needs "reward" and "token_ids", with "softmax" also "behaviour".
        fusion: a node's reward is the mean of its children's, or weighted by the softmax of their log-probs.
        temperature: of that softmax.
        limit: largest absolute credit.
        eps: added to the standard deviation.
        segment_tokens: tokens of a node.
        delimiter_ids: nodes begin at these tokens instead.
        shared: a node's credit goes to each of the samples that share it, or once to all together.

    Returns:
        (N,); 0 where a depth has one node, or nodes that agree.
    """
    layout = tokens.layout
    tree = tree_of(tokens, segment_tokens, delimiter_ids)
    reward = layout.first(tokens["reward"])
    edges = None
    if fusion == "softmax":
        total = reward.new_zeros(len(tree.depth)).index_add(0, tree.node_of_token, tokens["behaviour"])
        edges = total / tree.num_samples
    values = fused(tree, reward, edges, temperature)
    ids, num = joined(tree.group, tree.depth)
    return _to_tokens(normalised(values, ids, num, std="sample", eps=eps).clamp(-limit, limit), tree, shared)


def inter_and_intra(
    tokens: TokenBatch,
    *,
    depth: int = 1,
    segment_tokens: int = 512,
    delimiter_ids: tuple[int, ...] = (),
    std: Scale = "sample",
    eps: float = 1e-6,
) -> Tensor:
    """A = z(R among all trees of the prompt) + z(R in the sample's own tree), z = (R - mean) / (std + eps).

    Source: Tree-GRPO (Ji et al. 2025, arXiv 2509.21240), intra-tree and inter-tree advantage.

    Args:
        tokens: needs "reward" and "token_ids".
        depth: samples that share their first `depth` segments are one tree.
        segment_tokens: tokens of a segment.
        delimiter_ids: segments begin at these tokens instead.
        std, eps: scale of both terms.

    Returns:
        (N,); a tree of one sample has only the first term.
    """
    layout = tokens.layout
    tree = tree_of(tokens, segment_tokens, delimiter_ids)
    reward = layout.first(tokens["reward"])
    among = normalised(reward, layout.group_of_sample, layout.num_groups, std=std, eps=eps)
    within = normalised(reward, tree.ancestor(depth), len(tree.depth), std=std, eps=eps)
    return layout.spread(among + within)
