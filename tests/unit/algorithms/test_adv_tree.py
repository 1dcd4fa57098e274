"""Trees read off the tokens, and credit in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adv_fixtures import F64, ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from april.algorithms.advantages import tree
from april.algorithms.columns import TokenBatch
from april.algorithms.prefix_tree import PrefixTree, prefix_tree, segments

A, B, C, D, E, F, G, H = range(8)


def tree_of(tokens: TokenBatch, size: int) -> PrefixTree:
    return tree.tree_of(tokens, size, ())


def test_the_tree_of_the_module_docstring() -> None:
    tokens = ragged([5, 5, 4], [0, 0, 0], token_ids=[A, B, C, D, E, A, B, C, D, F, A, B, G, H])
    found = tree_of(tokens, 2)
    assert found.depth.tolist() == [1, 2, 2, 3, 3] and [(s.start, s.stop) for s in found.levels()] == [(0, 1), (1, 3), (3, 5)]
    ab, cd, gh = (int(found.node_of_token[row]) for row in (0, 2, 12))
    assert found.num_samples[ab] == 3 and found.num_samples[cd] == 2 and found.num_samples[gh] == 1
    assert found.parent[ab] == -1 and found.parent[cd] == ab and found.parent[gh] == ab
    assert found.parent[found.leaf[:2]].tolist() == [cd, cd] and found.leaf[2] == gh
    assert found.node_of_token.tolist()[:4] == found.node_of_token.tolist()[5:9]
    assert found.ancestor(2).tolist() == [cd, cd, gh] and found.ancestor(9).tolist() == found.leaf.tolist()


def test_groups_share_nothing_and_lengths_matter() -> None:
    tokens = ragged([2, 2, 1], [0, 1, 0], token_ids=[A, B, A, B, A])
    found = tree_of(tokens, 2)
    assert len(found.depth) == 3 and found.group.tolist().count(0) == 2
    same = tree_of(ragged([2, 2], [0, 0], token_ids=[A, B, A, B]), 2)
    assert len(same.depth) == 1 and same.num_samples.tolist() == [2]


def test_segments_at_delimiters() -> None:
    tokens = ragged([4, 3], [0, 0], token_ids=[H, A, H, B, A, H, B])
    begins = segments(tokens["token_ids"], tokens.layout, segment_tokens=1, delimiter_ids=(H,))
    assert begins.tolist() == [True, False, True, False, True, True, False]


FAMILY = st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), min_size=1, max_size=7)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(FAMILY, st.integers(1, 3))
def test_two_samples_share_a_node_exactly_if_they_share_the_prefix(samples: list[tuple[int, list[int]]], size: int) -> None:
    ids = [token for _, own in samples for token in own]
    tokens = ragged([len(own) for _, own in samples], [group for group, _ in samples], token_ids=ids)
    found = prefix_tree(tokens["token_ids"], tokens.layout, segments(tokens["token_ids"], tokens.layout, segment_tokens=size))
    nodes: dict[int, tuple[int, tuple[int, ...]]] = {}
    row = 0
    for group, own in samples:
        for position in range(len(own)):
            prefix = (group, tuple(own[: (position // size + 1) * size]))
            assert nodes.setdefault(int(found.node_of_token[row]), prefix) == prefix
            row += 1
    assert len(nodes) == len(set(nodes.values())) == len(found.depth)


def two_trees(**columns: object) -> TokenBatch:
    """a: b or c; d: e."""
    return ragged([2, 2, 2], [0, 0, 0], token_ids=[A, B, A, C, D, E], **columns)


def test_subgroups_by_hand() -> None:
    tokens = two_trees(reward=[1.0, 0, 1])
    found = tokens.layout.first(tree.subgroups(tokens, segment_tokens=1))
    third = 1 / 3
    assert torch.allclose(found, torch.tensor([(third + 0.5) / 2, (-2 * third - 0.5) / 2, third], dtype=F64))
    weighted = tokens.layout.first(tree.subgroups(tokens, segment_tokens=1, strategy="group_size"))
    assert torch.allclose(weighted, torch.tensor([(1 + 1) / 5, (-2 - 1) / 5, third], dtype=F64))
    without = tokens.layout.first(tree.subgroups(tokens, segment_tokens=2))
    assert torch.allclose(without, torch.tensor([third, -2 * third, third], dtype=F64))
    alone = ragged([1], [0], token_ids=[A], reward=[0.3])
    assert tree.subgroups(alone).tolist() == [0] and tree.subgroups(alone, singleton="raw").tolist() == [0.3]


def test_segment_gains_add_up_to_the_leaf_and_may_count_once() -> None:
    tokens = two_trees(reward=[1.0, 0, 1])
    each = tree.segment_gain(tokens, segment_tokens=1).reshape(3, 2)
    own = tree_of(tokens, 1)
    leaf = tree.over_ancestors(tokens, own, torch.ones_like(own.node).bool(), "group_size")
    assert torch.allclose(each.sum(1), leaf) and torch.equal(each[0, 0], each[1, 0])
    once = tree.segment_gain(tokens, segment_tokens=1, shared="once").reshape(3, 2)
    assert torch.allclose(once[:2, 0], each[:2, 0] / 2) and torch.equal(once[:, 1], each[:, 1])


def test_fusion_by_mean_and_by_log_prob() -> None:
    tokens = two_trees(reward=[1.0, 0, 1], behaviour=[-1.0, 0, -1.0, -20, -1, -1])
    own = tree_of(tokens, 1)
    at = own.node_of_token
    assert tree.fused(own, torch.tensor([1.0, 0, 1], dtype=F64))[at].tolist() == [0.5, 1, 0.5, 0, 1, 1]
    mean = tree.depthwise(tokens, segment_tokens=1)
    soft = tree.depthwise(tokens, segment_tokens=1, fusion="softmax")
    assert mean[0] < -0.7 and abs(float(soft[0])) < abs(float(mean[0])) + 1e-9
    clipped = tree.depthwise(tokens, segment_tokens=1, limit=0.1)
    assert clipped.abs().max() == 0.1


def test_samples_that_end_where_others_go_on_are_children_of_their_own() -> None:
    tokens = ragged([1, 2, 2], [0, 0, 0], token_ids=[A, A, B, A, C], reward=[1.0, 0, 0])
    own = tree_of(tokens, 1)
    value = tree.fused(own, torch.tensor([1.0, 0, 0], dtype=F64))
    assert torch.allclose(value[own.leaf[0]], torch.tensor(1 / 3, dtype=F64))
    soft = tree.fused(own, torch.tensor([1.0, 0, 0], dtype=F64), torch.full((3,), -30.0, dtype=F64))
    assert torch.allclose(soft[own.leaf[0]], torch.tensor(1.0, dtype=F64))


def test_intra_term_needs_siblings_in_the_tree() -> None:
    tokens = two_trees(reward=[1.0, 0, 1])
    found = tree.inter_and_intra(tokens, segment_tokens=1, eps=0.0).reshape(3, 2)[:, 0]
    plain = tree.inter_and_intra(tokens, segment_tokens=1, depth=2, eps=0.0).reshape(3, 2)[:, 0]
    assert torch.allclose(found - plain, torch.tensor([0.5**0.5, -(0.5**0.5), 0], dtype=F64))


ALL: dict[str, Callable[[TokenBatch], Tensor]] = {
    "subgroups": lambda tokens: tree.subgroups(tokens, segment_tokens=1),
    "group_size": lambda tokens: tree.subgroups(tokens, segment_tokens=1, strategy="group_size"),
    "segment_gain": lambda tokens: tree.segment_gain(tokens, segment_tokens=1),
    "depthwise": lambda tokens: tree.depthwise(tokens, segment_tokens=1),
    "softmax": lambda tokens: tree.depthwise(tokens, segment_tokens=1, fusion="softmax"),
    "inter_and_intra": lambda tokens: tree.inter_and_intra(tokens, segment_tokens=1),
}


def random_tree(rewards: list[float], order: list[int]) -> TokenBatch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, (3, 4, 5), generator=generator)[torch.tensor(order)]
    reward = torch.tensor(rewards, dtype=F64)[torch.randint(len(rewards), (3, 4), generator=generator)][torch.tensor(order)]
    columns = {"token_ids": ids.reshape(-1), "behaviour": -ids.reshape(-1).to(F64) - 0.5}
    return ragged([5] * 12, [g for g in range(3) for _ in range(4)], reward=reward.reshape(-1), **columns)


@pytest.mark.parametrize("name", ALL)
def test_permuted_groups_and_agreeing_ones(name: str) -> None:
    straight = ALL[name](random_tree([0.0, 0.3, 1.0], [0, 1, 2])).reshape(3, -1)
    moved = ALL[name](random_tree([0.0, 0.3, 1.0], [2, 0, 1])).reshape(3, -1)
    assert torch.allclose(straight[torch.tensor([2, 0, 1])], moved, atol=1e-12) and straight.any()
    alike = ALL[name](random_tree([0.7], [0, 1, 2]))
    assert torch.equal(alike, torch.zeros_like(alike))
    nobody = random_tree([0.7], [0, 1, 2]).take(torch.zeros(0, dtype=torch.int64))
    assert ALL[name](nobody).shape == (0,)
