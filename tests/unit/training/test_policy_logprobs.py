"""The policy: packed log-probs against a plain padded forward, at each sample's own temperature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixtures import VOCABULARY, small_policy, snapshot

import april.models.policy as policy_module
from april.core.errors import DataError, ModelError
from april.models.policy import PackedSequences, Policy

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(2, VOCABULARY, n) for n in (3, 1, 6, 2)]
RESPONSES = [RNG.integers(2, VOCABULARY, n) for n in (4, 7, 1, 5)]
TEMPERATURES = [1.0, 0.7, 1.3, 1.0]


def expected(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence at a time through the plain model: log-probs and entropies."""
    logprobs, entropies = [], []
    for prompt, response, temperature in zip(PROMPTS, RESPONSES, TEMPERATURES, strict=True):
        ids = torch.tensor(np.concatenate([prompt, response]))[None]
        with torch.no_grad():
            all_logprobs = (policy.module(input_ids=ids).logits[0] / temperature).log_softmax(-1)  # type: ignore[operator]
        at = all_logprobs[len(prompt) - 1 : -1]
        logprobs.append(at.gather(1, torch.tensor(response)[:, None])[:, 0])
        entropies.append(-(at.exp() * at).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def spread_temperatures() -> torch.Tensor:
    return torch.cat([torch.full((len(r),), t, dtype=torch.float64) for r, t in zip(RESPONSES, TEMPERATURES, strict=True)])


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "gpt_neox", "gemma2"])
def test_packed_log_probs_equal_the_plain_forward(kind: str) -> None:
    policy = small_policy(kind)
    assert policy.packed is (kind in ("qwen3", "qwen2", "llama"))
    out = policy.response_logprobs(PackedSequences.of(PROMPTS, RESPONSES), spread_temperatures(), entropy=True)
    logprobs, entropies = expected(policy)
    # Gemma-2 rounds its norms and attention to float32, and a padded row takes another attention path
    tolerance = 1e-5 if kind == "gemma2" else 1e-9
    assert torch.allclose(out.logprobs, logprobs, atol=tolerance)
    assert out.entropies is not None and torch.allclose(out.entropies, entropies, atol=tolerance)
    wrong = policy.response_logprobs(PackedSequences.of(PROMPTS, RESPONSES), torch.ones(len(logprobs)))
    assert not torch.allclose(wrong.logprobs, logprobs, atol=1e-2)


def test_chunks_of_the_vocabulary_projection_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sequences = small_policy(), PackedSequences.of(PROMPTS, RESPONSES)
    gradients = []
    for elements in (1 << 24, 3 * VOCABULARY):
        monkeypatch.setattr(policy_module, "LOGIT_ELEMENTS", elements)
        policy.module.zero_grad()
        policy.response_logprobs(sequences, spread_temperatures()).logprobs.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in policy.module.parameters() if parameter.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True)) and len(gradients[0]) > 10


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    plain = small_policy(kind)
    saving = Policy(small_policy(kind).module, gradient_checkpointing=True)
    for policy in (plain, saving):
        policy.response_logprobs(PackedSequences.of(PROMPTS, RESPONSES), spread_temperatures()).logprobs.sum().backward()
    pairs = [(a.grad, b.grad) for a, b in zip(plain.module.parameters(), saving.module.parameters(), strict=True)]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs if a is not None and b is not None)


def test_greedy_samples_and_empty_sequences_are_refused() -> None:
    policy = small_policy()
    with pytest.raises(DataError, match="greedy") as error:
        policy.response_logprobs(PackedSequences.of(PROMPTS, RESPONSES), 0 * spread_temperatures())
    assert "above 0" in str(error.value)
    with pytest.raises(DataError, match="sequence 1"):
        PackedSequences.of(PROMPTS[:2], [RESPONSES[0], RESPONSES[0][:0]])


def test_rows_and_targets_by_hand() -> None:
    packed = PackedSequences.of([np.array([5, 6]), np.array([7])], [np.array([8, 9]), np.array([4])])
    assert packed.token_ids.tolist() == [5, 6, 8, 9, 7, 4] and packed.lengths == (4, 2)
    assert packed.rows.tolist() == [1, 2, 4] and packed.targets.tolist() == [8, 9, 4]


def test_save_and_load_is_an_ordinary_folder(tmp_path: Path) -> None:
    policy = small_policy(dtype=torch.float32)
    policy.save(tmp_path)
    again = Policy.load(tmp_path)
    assert (tmp_path / "config.json").exists() and (tmp_path / "model.safetensors").exists()
    before, after = snapshot(policy), snapshot(again)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_load_errors_are_typed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        Policy.load(tmp_path / "nothing")
    assert "nothing" in str(error.value)


def test_from_config_is_seeded_and_leaves_the_global_stream_alone() -> None:
    config = {"model_type": "qwen3", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    torch.manual_seed(1)
    expected_draw = torch.rand(1)
    torch.manual_seed(1)
    one, same, other = (snapshot(Policy.from_config(config, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected_draw)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
