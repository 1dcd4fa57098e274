"""Guessed tokens change time, never tokens: the engine with guesses equals the engine without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded import running
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.embedded.speculate import Drafts, Payoff, accepted_counts, feed_of
from april.models.kv import KvBucket
from april.models.kv_draft import DraftStep
from april.models.lean_decode import LeanDecoder
from april.testing.engine_run import ContractViolation, EngineRun, cut, same_tokens
from april.testing.toy_model import CharTokenizer, ToyKind, toy_model

GUESSING = {"max_draft_tokens": 4, "draft_match_tokens": 1, "draft_adaptive": False}
REPETITIVE = {"temperature": 0.3}


@lru_cache
def _module(dtype: torch.dtype = torch.float64, kind: ToyKind = "qwen3", seed: int = 0) -> Any:
    return toy_model(kind, dtype=dtype, seed=seed)


def _run(module: Any = None, **options: Any) -> EngineRun:
    config = EmbeddedConfig(**({"max_running": 8, "kv_tokens": 4096, "steps_per_poll": 4} | options))
    return EngineRun(EmbeddedEngine(module or _module(), tokenizer=CharTokenizer(), clock=VirtualClock(), config=config))


def _samples(num_groups: int, size: int, **spec: Any) -> list[Sample]:
    prompts = [Prompt(f"p{serial}", np.arange(2, 8) + serial) for serial in range(num_groups)]
    options = {"max_new_tokens": 70} | spec
    return [
        Sample(GroupId(serial, 0, prompt.id).member(member), prompt, SamplingSpec(**options))
        for serial, prompt in enumerate(prompts)
        for member in range(size)
    ]


def _finish(run: EngineRun, samples: Sequence[Sample]) -> list[Sample]:
    run.submit(samples)
    run.drain()
    return run.results(samples)


SPECS: list[dict[str, Any]] = [
    REPETITIVE,
    {"temperature": 0.0},
    {"temperature": 0.5, "top_p": 0.9, "entropy": True},
    {"temperature": 0.4, "top_k": 5, "stop_token_ids": (9, 11)},
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4)])
def test_guesses_change_no_token(dtype: torch.dtype, tolerance: float, spec: dict[str, Any]) -> None:
    module, samples = _module(dtype), _samples(2, 3, **spec)
    guessing = _run(module, **GUESSING)
    found, expected = _finish(guessing, samples), _finish(_run(module), samples)
    same_tokens(found, expected, tolerance)
    load = guessing.engine.load()
    assert load.accepted_tokens > 20 and load.drafted_tokens > load.accepted_tokens and load.speculation == "on"
    if spec.get("entropy"):
        for left, right in zip(found, expected, strict=True):
            assert left.entropies is not None and right.entropies is not None
            np.testing.assert_allclose(left.entropies, right.entropies, atol=tolerance)


def test_guesses_make_fewer_steps() -> None:
    polls = []
    for options in ({}, GUESSING):
        run, samples = _run(steps_per_poll=1, **options), _samples(1, 1, temperature=0.0)
        run.submit(samples)
        count = 0
        while run.open:
            run.poll()
            count += 1
        polls.append(count)
    assert polls[0] == 70 and polls[1] < 60


def test_guesses_live_with_cuts_little_memory_and_short_reports() -> None:
    whole = _finish(_run(), _samples(3, 3, **REPETITIVE))
    random = np.random.default_rng(2)
    run = _run(max_running=5, kv_tokens=220, report_every_tokens=5, **GUESSING)
    for index in random.permutation(9):
        run.submit([cut(whole[index], int(random.integers(0, 60)))])
        if random.integers(2):
            run.poll()
    run.engine.abort([whole[3].id, whole[7].id])
    run.drain()
    parked = [run.samples[end.id] for end in run.ends if run.samples[end.id].stop is None]
    _finish(run, parked)
    same_tokens(run.results(whole), whole, 1e-7)
    assert run.engine.load().preemptions > 0 and run.engine.load().accepted_tokens > 20
    assert max(len(segment) for _, segment in run.segments) <= 5


def test_a_stop_string_inside_a_guess_ends_the_sample_there() -> None:
    whole = _finish(_run(), _samples(1, 4, **REPETITIVE))
    text = CharTokenizer().decode(whole[0].token_ids.tolist())
    samples = _samples(1, 4, stop_strings=(text[29:31],), **REPETITIVE)
    guessing = _run(**GUESSING)
    found = _finish(guessing, samples)
    same_tokens(found, _finish(_run(), samples), 1e-7)
    assert "stop" in {sample.stop for sample in found} and guessing.engine.load().accepted_tokens > 0
    assert guessing.engine.load().generated_tokens == sum(map(len, found))


@pytest.mark.parametrize("mode", ["recompute", "keep_kv", "drain"])
def test_guesses_live_with_updates(mode: Any) -> None:
    results = []
    for options in ({}, GUESSING):
        run, samples = _run(steps_per_poll=1, **options), _samples(1, 3, **REPETITIVE)
        run.submit([replace(sample, spec=replace(sample.spec, max_new_tokens=12)) for sample in samples])
        run.drain()
        again = [replace(sample, spec=samples[0].spec, stop=None) for sample in run.results(samples)]
        run.engine.update_weights(dict(_module(seed=1).named_parameters()), 1, mode)
        results.append(_finish(run, again))
    same_tokens(results[0], results[1], 1e-7)
    assert [sample.versions.tolist() for sample in results[0]] == [sample.versions.tolist() for sample in results[1]]


def test_a_wrong_rule_of_acceptance_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = _samples(1, 3, temperature=0.6)
    expected = _finish(_run(), samples)
    monkeypatch.setattr(running, "accepted_counts", lambda fed, drawn, counts: counts - 1)
    with pytest.raises(ContractViolation, match="are equal"):
        same_tokens(_finish(_run(**GUESSING), samples), expected, 1e-4)
    assert len(expected) == 3


def _chi_square(run: EngineRun, count: int) -> float:
    """Of the last two tokens of many responses, against their exact probabilities; 3 tokens of a vocabulary of 6."""
    prompt = Prompt("p", [2, 3, 2, 3, 2])
    spec = SamplingSpec(max_new_tokens=2)
    samples = [Sample(GroupId(0, 0, "p").member(member), prompt, spec) for member in range(count)]
    found = np.array([sample.token_ids for sample in _finish(run, samples)])
    module = _tiny()
    with torch.no_grad():
        first = torch.softmax(module(torch.tensor([prompt.token_ids.tolist()])).logits[0, -1], -1)
        rows = torch.tensor([[*prompt.token_ids.tolist(), token] for token in range(6)])
        second = torch.softmax(module(rows).logits[:, -1], -1)
    expected = (first[:, None] * second).numpy().ravel() * count
    observed = np.bincount(found[:, 0] * 6 + found[:, 1], minlength=36)
    return float(((observed - expected) ** 2 / expected).sum())


@lru_cache
def _tiny() -> Any:
    return toy_model("qwen3", vocab_size=6, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, spread=0.5)


def test_the_distribution_of_tokens_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_running": 256, "kv_tokens": 65_536, "steps_per_poll": 50} | GUESSING
    run = _run(_tiny(), **options)
    assert _chi_square(run, 3000) < 66.6  # 0.999 quantile with 35 degrees of freedom
    assert run.engine.load().accepted_tokens > 100
    monkeypatch.setattr(running, "accepted_counts", lambda fed, drawn, counts: counts - 1)
    assert _chi_square(_run(_tiny(), **options), 3000) > 100


def test_other_forwards_do_without() -> None:
    run, samples = _run(_module(kind="gpt_neox"), **GUESSING), _samples(1, 2, max_new_tokens=10)
    assert len(_finish(run, samples)) == 2
    assert run.engine.load().drafted_tokens == 0 and run.engine.load().speculation.startswith("off: this forward")
    assert _run().engine.load().speculation == "off"


def test_guesses_stop_where_they_do_not_pay_and_go_on_where_they_do() -> None:
    random = _run(**(GUESSING | {"draft_adaptive": True, "draft_overhead_rows": 2}))
    _finish(random, _samples(2, 4, temperature=2.0))
    load = random.engine.load()
    assert load.speculation.startswith("paused: 0.") and "rows" in load.speculation
    assert load.drafted_tokens < 0.5 * load.generated_tokens
    good = _run(**(GUESSING | {"draft_adaptive": True, "draft_overhead_rows": 100}))
    _finish(good, _samples(1, 2, temperature=0.0))
    assert good.engine.load().accepted_tokens > 20


def test_the_payoff_counts_tokens() -> None:
    payoff = Payoff(10, adaptive=True)
    assert payoff.rows(5) == 5  # 0.5 of guesses are believed to hold, 1/3 needed
    payoff.verified(256, 20)
    assert [payoff.rows(40) for _ in range(70)].count(4) == 1
    assert payoff.state == "paused: 0.08 of the guesses hold, 0.80 needed with 40 rows"
    assert payoff.rows(1) == 0
    payoff.verified(256, 240)
    assert payoff.rows(40) == 40 and payoff.state == "on" and (payoff.drafted_tokens, payoff.accepted_tokens) == (512, 260)
    assert [payoff.pays(40, drafted) for drafted in (0, 30, 2)] == [False, True, False]
    assert payoff.state == "paused: 2 guesses are too few for a step with 40 rows"
    eager = Payoff(0, adaptive=False)
    assert eager.rows(500) == 500 and eager.pays(500, 1) and not eager.pays(500, 0)


def test_acceptance_ends_with_the_first_difference() -> None:
    fed = np.array([[1, 5, 6, 7], [1, 5, 6, 7], [1, 5, -1, -1], [1, -1, -1, -1]])
    drawn = np.array([[5, 6, 7, 9], [5, 4, 7, 9], [5, -1, -1, -1], [-1, 2, 3, 4]])
    assert accepted_counts(fed, drawn, np.array([4, 4, 2, 1])).tolist() == [3, 1, 1, 0]
    feed = feed_of(np.array([1, 2]), [[5, 6], []])
    assert feed.token_ids.tolist() == [[1, 5, 6], [2, -1, -1]] and feed.packed.sum() == 4


def test_guesses_come_from_the_group() -> None:
    drafts, group = Drafts(2, 8, 30), GroupId(0, 0, "p")
    drafts.open(0, group, [1, 2, 3, 4, 5, 6])
    drafts.open(1, group, [9, 1, 2])
    assert drafts.guess(1, 8) == [3, 4] and drafts.guess(1, 1) == [3] and drafts.guess(1, 0) == []
    drafts.verified(1, 2, 2)
    assert drafts.guess(1, 8) == [3, 4, 5, 6]
    drafts.close(0)
    assert drafts.guess(1, 8) == [3, 4, 5, 6]
    drafts.verified(1, 4, 0)
    drafts.extend(1, [7])
    assert drafts.guess(1, 8) == []
    drafts.open(2, GroupId(1, 0, "q"), [1, 2])
    assert drafts.guess(2, 8) == []
    drafts.close(1)
    drafts.open(3, GroupId(2, 0, "r"), list(range(25)))
    drafts.open(4, group, [1, 2])
    assert drafts.guess(4, 8) == []  # forgotten: nobody of its group was running when memory was short


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_several_tokens_a_row_equal_one_at_a_time(dtype: torch.dtype) -> None:
    decoder = LeanDecoder.from_module(_module(torch.float32), dtype)
    assert decoder is not None
    shape, lengths, counts = decoder.shape, [5, 9, 3], [1, 4, 2]
    ids = torch.arange(17) + 2
    fed = torch.arange(7) + 20

    def bucket() -> KvBucket:
        made = KvBucket(shape.num_layers, shape.num_kv_heads, shape.head_dim, 16, dtype, torch.device("cpu"))
        states = decoder.prefill(ids, lengths)
        made.resize(4)
        for index, length in enumerate(lengths):
            made.insert(states.kv_of(index), length)
        made.set_lengths(lengths)
        return made

    with torch.inference_mode():
        step = DraftStep(bucket(), torch.tensor(lengths), torch.tensor(counts))
        positions = torch.tensor([5, 9, 10, 11, 12, 3, 4])
        assert (step.size, step.longest) == (7, 13)
        found = decoder.decode(fed, positions, 13, [step]).float()
        plain, places, expected = bucket(), [0, 1, 5], torch.zeros_like(found)
        for turn in range(4):
            plain.begin_step()
            rows = [place + min(turn, count - 1) for place, count in zip(places, counts, strict=True)]
            logits = decoder.decode(fed[rows], torch.tensor(lengths) + turn, 16, [plain]).float()
            for row, count, index in zip(rows, counts, range(3), strict=True):
                if turn < count:
                    expected[row] = logits[index]
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
