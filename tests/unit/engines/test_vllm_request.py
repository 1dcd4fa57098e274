"""What both vLLM engines ask for, and entropies from some log-probs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from april.core.errors import EngineError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec
from april.engines.vllm.request import Request, Settings, entropy

LARGE = Settings(100, 100, 50_000, 4096, 0, has_tokenizer=True, seeded=True)


def sample(**spec: object) -> Sample:
    prompt = Prompt("p", np.asarray([5, 6, 7], np.int32))
    return Sample(GroupId(0, 0, "p").member(0), prompt, SamplingSpec(**{"max_new_tokens": 12, **spec}))  # type: ignore[arg-type]


def test_entropies_in_numbers() -> None:
    logs = [math.log(p) for p in (0.125, 0.5, 0.125, 0.25)]
    assert entropy(logs, 0) == pytest.approx(1.2130, abs=1e-4)
    assert entropy(logs, 2) == pytest.approx(3 * 0.25 * math.log(4), abs=1e-12), "1/2, 1/4, and all others as one of 1/4"
    assert entropy([*logs, -math.inf], 0) == pytest.approx(1.2130, abs=1e-4), "a token that cannot be drawn adds nothing"
    assert entropy([0.0], 1) == 0.0


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12), st.integers(1, 12))
def test_the_estimate_never_exceeds_the_entropy(masses: list[float], top_k: int) -> None:
    logs = [math.log(mass / sum(masses)) for mass in masses]
    exact, estimate = entropy(logs, 0), entropy(logs, top_k)
    assert -1e-9 <= estimate <= exact + 1e-9
    assert top_k < len(masses) - 1 or estimate == pytest.approx(exact), "all but one token known is all known"
    kept = sorted(logs, reverse=True)[:top_k]
    drawn = [kept[-1] - 1.0, *kept] if top_k <= len(masses) else kept
    assert entropy(drawn, top_k) == estimate, "a drawn token that is not among the likely ones does not count"


def test_what_is_asked_of_vllm() -> None:
    given_tokens = sample(entropy=True, temperature=0.7, top_k=8, stop_token_ids=(0,)).extended(
        Segment(np.asarray([1, 2], np.int32), np.asarray([-1.0, -1.0], np.float32), 0, "s")
    )
    asked = Request(3, given_tokens).parameters(replace(LARGE, entropy_top_k=16))
    assert asked["max_tokens"] == 10 and asked["logprobs"] == 16 and asked["ignore_eos"] and not asked["detokenize"]
    assert asked["seed"] != Request(3, sample(temperature=0.7)).parameters(LARGE)["seed"], "where this life begins counts"
    assert Request(3, sample()).parameters(LARGE)["logprobs"] == 0
    assert Request(3, sample(entropy=True)).parameters(LARGE)["logprobs"] == -1
    assert Request(3, sample(temperature=0.0)).parameters(LARGE)["seed"] is None


def test_exact_entropies_are_refused_where_they_cost_too_much() -> None:
    with pytest.raises(EngineError, match="entropy_top_k = 64"):
        LARGE.check(sample(entropy=True))
    estimating = replace(LARGE, entropy_top_k=16)
    estimating.check(sample(entropy=True))
    assert not estimating.exact_entropies and not replace(LARGE, vocab_size=50, entropy_top_k=16).exact_entropies
    assert replace(LARGE, vocab_size=50).exact_entropies
