"""The engine on the packaged policy: greedy responses are those of `transformers.generate`, log-probs those of the module."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.testing.engine_run import EngineRun

NUM_PROMPTS = 200
LONGEST = 200
EOS = 1


@lru_cache
def _policy() -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(files("april") / "assets" / "policy")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _prompts(num_prompts: int) -> list[Prompt]:
    """Sums of 4 to 12 one-digit numbers, as the policy knows them."""
    random, tokenizer = np.random.default_rng(0), _policy()[1]
    prompts = []
    for index in range(num_prompts):
        terms = random.integers(0, 10, size=int(random.integers(4, 13)))
        signs = random.choice([" + ", " - "], size=len(terms) - 1)
        text = str(terms[0]) + "".join(f"{sign}{term}" for sign, term in zip(signs, terms[1:], strict=True))
        prompts.append(Prompt(f"p{index}", tokenizer.encode(text)))
    return prompts


def _respond(prompts: list[Prompt], *, temperature: float, **options: Any) -> tuple[list[Sample], EmbeddedEngine]:
    engine = EmbeddedEngine(_policy()[0], clock=VirtualClock(), config=EmbeddedConfig(max_running=64, **options))
    spec = SamplingSpec(max_new_tokens=LONGEST, temperature=temperature, stop_token_ids=(EOS,))
    samples = [Sample(GroupId(index, 0, prompt.id).member(0), prompt, spec) for index, prompt in enumerate(prompts)]
    run = EngineRun(engine)
    run.submit(samples)
    run.drain()
    return run.results(samples), engine


def _generate(prompts: list[Prompt]) -> list[list[int]]:
    """Greedy responses, cut behind the end token; prompts of one length go together, so that nothing is padded."""
    found: dict[str, list[int]] = {}
    for length in sorted({len(prompt.token_ids) for prompt in prompts}):
        batch = [prompt for prompt in prompts if len(prompt.token_ids) == length]
        ids = torch.from_numpy(np.stack([prompt.token_ids for prompt in batch]).astype(np.int64))
        options = {"do_sample": False, "max_new_tokens": LONGEST, "eos_token_id": EOS, "pad_token_id": 0}
        rows = _policy()[0].generate(ids, attention_mask=torch.ones_like(ids), **options)[:, length:].tolist()
        found |= {prompt.id: row[: row.index(EOS) + 1] if EOS in row else row for prompt, row in zip(batch, rows, strict=True)}
    return [found[prompt.id] for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("max_draft_tokens", [0, 4])
def test_greedy_responses_are_those_of_generate(max_draft_tokens: int) -> None:
    prompts = _prompts(NUM_PROMPTS)
    found, engine = _respond(prompts, temperature=0.0, max_draft_tokens=max_draft_tokens, draft_adaptive=False)
    assert [sample.token_ids.tolist() for sample in found] == _generate(prompts)
    assert sum(map(len, found)) > 5 * NUM_PROMPTS and bool(engine.load().accepted_tokens) == bool(max_draft_tokens)


def test_sampled_log_probs_are_those_of_a_plain_forward() -> None:
    found, engine = _respond(_prompts(NUM_PROMPTS), temperature=1.0)
    worst = 0.0
    for sample in found:
        ids = torch.from_numpy(np.concatenate([sample.prompt.token_ids, sample.token_ids]).astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(_policy()[0](ids[None]).logits[0, :-1].double(), -1)
        plain = logprobs.gather(1, ids[1:, None]).squeeze(1).numpy()[-len(sample) :]
        worst = max(worst, float(np.abs(sample.behaviour_logprobs - plain).max()))
    assert 0 < worst < 1e-4
    assert max(float(np.abs(s - f.behaviour_logprobs).max()) for s, f in zip(engine.score(found), found, strict=True)) < 1e-4
