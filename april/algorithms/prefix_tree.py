"""Trees over samples that begin alike: segments of tokens are nodes, whoever sampled them.

sample 0   a b | c d | e      group 0      root - ab - cd - e
sample 1   a b | c d | f      group 0                  \\- f
sample 2   a b | g h          group 0           \\- gh
nodes      ab (3 samples), cd (2), gh (1), e (1), f (1), by depth

Prefixes are compared by 64-bit fingerprints; with a million segments two different ones agree with probability 3e-8.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from april.algorithms.columns import Layout


@dataclass(frozen=True)
class PrefixTree:
    """R segments of S samples, shared in M nodes; nodes are sorted by depth.

    Attributes:
        segment_of_token: int64 (N,).
        sample: int64 (R,), whose segment it is; the segments of a sample follow each other.
        node: int64 (R,), below M.
        depth: int64 (M,), from 1; the root of each group has depth 0 and is no node.
        parent: int64 (M,), -1 where the root is.
        group: int64 (M,).
        num_samples: int64 (M,), samples that pass through or end there.
        leaf: int64 (S,), the node where each sample ends.
    """

    segment_of_token: Tensor
    sample: Tensor
    node: Tensor
    depth: Tensor
    parent: Tensor
    group: Tensor
    num_samples: Tensor
    leaf: Tensor

    @property
    def node_of_token(self) -> Tensor:
        """int64 (N,)."""
        return self.node[self.segment_of_token]

    def levels(self) -> list[slice]:
        """The nodes of each depth, from 1."""
        ends = torch.bincount(self.depth).cumsum(0).tolist() if len(self.depth) else [0]
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def ancestor(self, depth: int) -> Tensor:
        """int64 (S,): the node of each sample at a depth from 1, or where it ends if that is nearer to the root."""
        num_segments = torch.bincount(self.sample)
        first = num_segments.cumsum(0) - num_segments
        return self.node[first + num_segments.clamp(max=depth) - 1]


def segments(token_ids: Tensor, layout: Layout, *, segment_tokens: int, delimiter_ids: Sequence[int] = ()) -> Tensor:
    """bool (N,): where a segment of its sample begins.

    Args:
        token_ids: int64 (N,).
        layout: whose they are.
        segment_tokens: tokens of a segment; the last one of a sample may have fewer.
        delimiter_ids: when given, a segment begins at each of these tokens instead.
    """
    begins = torch.zeros(layout.num_tokens, dtype=torch.bool, device=token_ids.device)
    begins[layout.offsets[:-1]] = True
    if delimiter_ids:
        for token_id in delimiter_ids:
            begins |= token_ids == token_id
        return begins
    return begins | (positions(layout) % segment_tokens == 0)


def positions(layout: Layout) -> Tensor:
    """int64 (N,): position of each token in its response."""
    return torch.arange(layout.num_tokens, device=layout.offsets.device) - layout.spread(layout.offsets[:-1])


def prefix_tree(token_ids: Tensor, layout: Layout, begins: Tensor) -> PrefixTree:
    """The tree of each group's samples.

    Args:
        token_ids: int64 (N,).
        layout: whose they are; every sample has a token.
        begins: bool (N,), first token of each segment; True at the first token of each sample.

    Returns:
        Its nodes. Samples that are equal to their end share every node.
    """
    segment = begins.cumsum(0) - 1
    starts = begins.nonzero().squeeze(1)
    ends = torch.cat([starts, starts.new_tensor([layout.num_tokens])])[1:] - 1
    sample = layout.sample_of_token[starts]
    depth = segment[starts] - segment[layout.offsets[:-1]][sample] + 1
    running = mixed(token_ids, positions(layout)).cumsum(0)
    before = torch.cat([running.new_zeros(1), running])[layout.offsets[:-1]]
    key = running[ends] - before[sample] + mixed(layout.group_of_sample[sample], -depth)
    keys, node = torch.unique(key, return_inverse=True)
    depth_of_node = depth.new_zeros(len(keys)).index_copy(0, node, depth)
    order = torch.argsort(depth_of_node, stable=True)
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
    node, depth_of_node = rank[node], depth_of_node[order]
    deeper = (depth > 1).nonzero().squeeze(1)
    last = torch.cat([sample[1:] != sample[:-1], sample.new_ones(min(1, len(sample))).bool()])
    return PrefixTree(
        segment_of_token=segment,
        sample=sample,
        node=node,
        depth=depth_of_node,
        parent=torch.full_like(order, -1).index_copy(0, node[deeper], node[deeper - 1]),
        group=torch.zeros_like(order).index_copy(0, node, layout.group_of_sample[sample]),
        num_samples=torch.bincount(node, minlength=len(order)),
        leaf=node[last],
    )


def mixed(a: Tensor, b: Tensor) -> Tensor:
    """int64: pseudo-random bits of pairs of numbers. Sums of them fingerprint a sequence of (value, place)."""
    x = a * -7046029254386353131 + b * -4417276706812531889 + 1609587929392839161
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
