"""How long each advantage takes for a step of a million tokens in 8,192 samples, on one thread, in CPU time.

python benchmarks/advantages.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from april.algorithms.advantages import group, returns, sets, steps, tree
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.steps import turns

NUM_SAMPLES, NUM_TOKENS, GROUP_SIZE, LINE = 8192, 1_000_000, 8, 35
F64 = torch.float64


def long_tailed_batch() -> TokenBatch:
    """Log-normal lengths; samples of a group begin alike; an environment speaks in ten of every fifty tokens."""
    torch.manual_seed(0)
    lengths = torch.distributions.LogNormal(4.3, 0.9).sample((NUM_SAMPLES,))
    lengths = (lengths * NUM_TOKENS / lengths.sum()).long().clamp(min=1)
    layout = Layout(
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), torch.arange(NUM_SAMPLES) // GROUP_SIZE, NUM_SAMPLES // GROUP_SIZE
    )
    size = layout.num_tokens
    position = torch.arange(size) - layout.spread(layout.offsets[:-1])
    reward = layout.spread(torch.randint(2, (NUM_SAMPLES,)).to(F64))
    columns = {
        "token_ids": torch.where(position < 24, torch.randint(3, (size,)), torch.randint(36, (size,))),
        "mask": position % 50 < 40,
        "reward": reward,
        "correct": reward,
        "value": torch.rand(size, dtype=F64),
        "finished": layout.spread(torch.rand(NUM_SAMPLES) > 0.1),
        "token_reward": torch.zeros(size, dtype=F64),
        "behaviour": -torch.rand(size, dtype=F64),
        "part.a": layout.spread(torch.rand(NUM_SAMPLES, dtype=F64)),
        "part.a_confidence": layout.spread(torch.rand(NUM_SAMPLES, dtype=F64)),
    }
    return TokenBatch(layout, columns)


def cases(tokens: TokenBatch) -> dict[str, Callable[[], object]]:
    """What is timed, by its name in a recipe."""
    said = ~tokens["mask"]
    whole = tokens.with_columns(**turns(tokens["token_ids"], said, tokens.layout))
    return {
        "columns turn, anchor": lambda: turns(tokens["token_ids"], said, tokens.layout),
        "group": lambda: group.group_relative(whole),
        "leave_one_out": lambda: group.leave_one_out(whole),
        "optimal_baseline": lambda: group.optimal_baseline(whole),
        "maximum_likelihood": lambda: group.maximum_likelihood(whole),
        "pass_at_k": lambda: group.pass_at_k(whole),
        "decoupled": lambda: group.decoupled(whole, parts={"a": 1.0}),
        "rubric": lambda: group.rubric(whole, items={"a": 1.0}),
        "token_weighted": lambda: group.token_weighted(whole),
        "reward_to_go": lambda: returns.reward_to_go(whole),
        "gae": lambda: returns.gae(whole),
        "anchored, turns": lambda: steps.anchored(whole),
        "anchored, lines": lambda: steps.anchored(whole, delimiter_ids=(LINE,)),
        "same_step": lambda: steps.same_step(whole),
        "tree_subgroups, 16": lambda: tree.subgroups(whole, segment_tokens=16),
        "tree_gain, 16": lambda: tree.segment_gain(whole, segment_tokens=16),
        "tree_depthwise, 16": lambda: tree.depthwise(whole, segment_tokens=16),
        "tree_inter_intra, 16": lambda: tree.inter_and_intra(whole, segment_tokens=16),
        "tree_subgroups, 1": lambda: tree.subgroups(whole, segment_tokens=1),
        "polychromic": lambda: sets.polychromic(whole),
    }


def main() -> None:
    """Print a table; best of three."""
    torch.set_num_threads(1)
    tokens = long_tailed_batch()
    print(f"{tokens.layout.num_tokens} tokens, {NUM_SAMPLES} samples, longest {int(tokens.layout.lengths.max())}")
    for name, run in cases(tokens).items():
        times = []
        for _ in range(3):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        print(f"| {name} | {min(times) * 1e3:.0f} |")


if __name__ == "__main__":
    main()
