"""Prompts that several responses share are computed once, and nothing changes but the time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from april.models.attention import packed_layout, shared_prefixes
from april.models.policy import PackedSequences, Policy
from april.testing.toy_model import toy_model

VOCABULARY = 17


def sequences(seed: int = 0) -> PackedSequences:
    """Three prompts, in no order, with one, three and two responses."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, VOCABULARY, n).astype(np.int32) for n in (4, 6, 1)]
    order = [1, 0, 2, 1, 1, 2]
    responses = [rng.integers(2, VOCABULARY, n).astype(np.int32) for n in (3, 9, 2, 7, 1, 5)]
    return PackedSequences.of([prompts[i].copy() for i in order], responses)


def results(kind: str, dtype: torch.dtype, given: PackedSequences, checkpointing: bool = False) -> tuple[Tensor, list[Tensor]]:
    module = toy_model(kind, dtype=dtype, seed=0, vocab_size=VOCABULARY, hidden_size=16, num_heads=4, num_kv_heads=2)  # type: ignore[arg-type]
    policy = Policy(module, gradient_checkpointing=checkpointing)
    logprobs = policy.response_logprobs(given, torch.full((len(given.rows),), 0.7)).logprobs
    (logprobs * torch.sin(torch.arange(len(logprobs)))).sum().backward()
    return logprobs.detach(), [p.grad for p in policy.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt_neox"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 1e-6)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_are_those_of_separate_prompts(
    kind: str, dtype: torch.dtype, tolerance: float, checkpointing: bool
) -> None:
    shared = sequences()
    assert shared.prompt_numbers == (0, 1, 2, 0, 0, 2)
    apart = results(kind, dtype, replace(shared, prompt_numbers=()))
    logprobs, gradients = results(kind, dtype, shared, checkpointing)
    assert torch.allclose(logprobs, apart[0], atol=tolerance, rtol=0)
    size = max(float(g.abs().max()) for g in apart[1])
    assert all(float((a - b).abs().max()) <= tolerance * max(1.0, size) for a, b in zip(gradients, apart[1], strict=True))
    assert size > 1e-2


def test_prompts_that_are_taken_for_equal_and_are_not_would_show() -> None:
    given = sequences()
    wrong = replace(given, prompt_numbers=(0, 1, 2, 0, 3, 2), prompt_lengths=(6, 4, 1, 6, 6, 1))
    assert torch.equal(results("qwen3", torch.float32, wrong)[0], results("qwen3", torch.float32, given)[0])
    mixed = replace(given, prompt_numbers=(0, 0, 1, 0, 0, 1), prompt_lengths=(4, 4, 1, 4, 4, 1))
    assert not torch.allclose(results("qwen3", torch.float32, mixed)[0], results("qwen3", torch.float32, given)[0], atol=1e-3)


def test_the_layout_by_hand() -> None:
    layout = shared_prefixes(packed_layout([4, 2, 3]), [4, 2, 3], [(0, 2), (1, 1), (0, 2)])
    # sorted: sequence 1 (2 rows), sequence 2 (3), sequence 0 (4); sequence 2 comes first of the two with prefix 0
    assert layout.keep is not None and layout.expand is not None
    assert layout.keep.tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert layout.expand.tolist() == [0, 1, 2, 3, 4, 2, 3, 5, 6]
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 2, 3]


def test_without_common_prompts_nothing_is_gathered() -> None:
    layout = packed_layout([3, 2])
    assert shared_prefixes(layout, [3, 2], [(0, 1), (1, 1)]) is layout and layout.keep is None
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCABULARY, n).astype(np.int32) for n in (3, 4)]
    assert PackedSequences.of(prompts, prompts).prompt_numbers == ()


def test_rows_that_are_computed_once() -> None:
    given = sequences()
    module = toy_model("qwen3", dtype=torch.float32, seed=0, vocab_size=VOCABULARY, hidden_size=16, num_heads=4, num_kv_heads=2)
    policy = Policy(module)
    seen: list[int] = []
    module.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    for case in (given, replace(given, prompt_numbers=())):
        policy.response_logprobs(case, torch.ones(len(case.rows)))
    assert seen == [27 + 4 + 6 + 1, 27 + 4 + 3 * 6 + 2 * 1]
