"""What is special about the embedded engine; what every engine promises is in tests/contracts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from april.core.clock import VirtualClock
from april.core.errors import EngineError, ModelError
from april.core.event import Finished, Progressed
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.embedded.memory import KvMemory
from april.engines.embedded.transformers_forward import CachedTransformersForward, transformers_forward
from april.models.kv import KvBucket
from april.testing.engine_run import EngineRun, cut, same_tokens
from april.testing.toy_model import CharTokenizer, ToyKind, toy_model


@lru_cache
def _module(seed: int = 0, dtype: torch.dtype = torch.float64, kind: ToyKind = "qwen3") -> Any:
    return toy_model(kind, dtype=dtype, seed=seed)


def _run(module: Any = None, **options: Any) -> EngineRun:
    config = EmbeddedConfig(**({"max_running": 8, "kv_tokens": 4096, "steps_per_poll": 4} | options))
    return EngineRun(EmbeddedEngine(module or _module(), tokenizer=CharTokenizer(), clock=VirtualClock(), config=config))


def _samples(num_groups: int, size: int, num_prompt: int = 6, **spec: Any) -> list[Sample]:
    prompts = [Prompt(f"p{serial}", np.arange(2, 2 + num_prompt) + serial) for serial in range(num_groups)]
    budget = {"max_new_tokens": 40} | spec
    return [
        Sample(GroupId(serial, 0, prompt.id).member(member), prompt, SamplingSpec(**budget))
        for serial, prompt in enumerate(prompts)
        for member in range(size)
    ]


def _finish(run: EngineRun, samples: Sequence[Sample]) -> list[Sample]:
    run.submit(samples)
    run.drain()
    return run.results(samples)


@lru_cache
def _whole(dtype: torch.dtype) -> tuple[Sample, ...]:
    return tuple(_finish(_run(_module(0, dtype)), _samples(3, 3)))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_cut_anywhere_in_any_company_gives_the_same_sample(data: st.DataObject) -> None:
    whole = _whole(torch.float64)
    cuts = data.draw(st.lists(st.integers(0, 39), min_size=9, max_size=9))
    order = data.draw(st.permutations(range(9)))
    run = _run(max_running=data.draw(st.integers(1, 9)), kv_tokens=data.draw(st.sampled_from([64, 150, 4096])))
    for index in order:
        run.submit([cut(whole[index], cuts[index])])
        if data.draw(st.booleans()):
            run.poll()
    run.drain()
    found = run.results(whole)
    same_tokens(found, whole, 1e-7)
    assert [sample.token_ids.tolist() for sample in found] == [sample.token_ids.tolist() for sample in whole]


@pytest.mark.parametrize("seed", [0, 1])
def test_cut_anywhere_in_float32(seed: int) -> None:
    whole = _whole(torch.float32)
    random = np.random.default_rng(seed)
    run = _run(_module(0, torch.float32), max_running=4)
    found = _finish(run, [cut(whole[index], int(random.integers(0, 40))) for index in random.permutation(9)])
    assert len(found) == 9
    same_tokens(run.results(whole), whole, 1e-4)


def test_another_seed_gives_other_tokens() -> None:
    first, second = (_finish(_run(), _samples(1, 2, seed=seed)) for seed in (0, 1))
    assert first[0].token_ids.tolist() != second[0].token_ids.tolist()
    assert first[0].token_ids.tolist() != first[1].token_ids.tolist()


def test_greedy_equals_generate() -> None:
    module, sample = _module(), _samples(1, 1, temperature=0.0)[0]
    found = _finish(_run(), [sample])[0]
    ids = torch.from_numpy(sample.prompt.token_ids.astype(np.int64))[None]
    expected = module.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=None, attention_mask=torch.ones_like(ids))
    assert found.token_ids.tolist() == expected[0, 6:].tolist()
    assert found.behaviour_logprobs.tolist() == [0.0] * 40


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_log_probs_are_those_of_the_module(kind: ToyKind) -> None:
    module = _module(0, torch.float64, kind)
    for sample in _finish(_run(module), _samples(1, 2, temperature=0.7, max_new_tokens=20)):
        ids = torch.from_numpy(np.concatenate([sample.prompt.token_ids, sample.token_ids]).astype(np.int64))
        logprobs = torch.log_softmax(module(ids[None]).logits[0, 5:-1].detach() / 0.7, -1)
        expected = logprobs.gather(1, ids[6:, None]).squeeze(1).numpy()
        np.testing.assert_allclose(sample.behaviour_logprobs, expected, atol=1e-6)
        assert len(sample) == 20


def test_a_prompt_is_prefilled_once_for_its_group() -> None:
    run = _run(max_running=16)
    _finish(run, _samples(2, 4, num_prompt=6))
    load = run.engine.load()
    assert (load.prefill_tokens, load.shared_tokens) == (2 * 5, 2 * 3 * 5)
    late = _run(max_running=16)
    samples = _samples(1, 4, num_prompt=6)
    late.submit(samples[:1])
    late.poll()
    late.submit(samples[1:])
    late.drain()
    assert (late.engine.load().prefill_tokens, late.engine.load().shared_tokens) == (5, 15)
    alone = _run(share_prefix=False)
    _finish(alone, samples)
    assert (alone.engine.load().prefill_tokens, alone.engine.load().shared_tokens) == (20, 0)
    same_tokens(alone.results(samples), late.results(samples), 1e-7)


def test_a_child_copies_the_kv_of_its_running_parent() -> None:
    whole = _finish(_run(), _samples(1, 1))
    run = _run()
    run.submit([cut(whole[0], 20)])
    run.poll()
    before = run.engine.load()
    run.submit([cut(whole[0], 15).forked(12, "0")])
    run.poll()
    after = run.engine.load()
    assert (after.prefill_tokens - before.prefill_tokens, after.shared_tokens - before.shared_tokens) == (0, 6 + 12 - 1)


def test_no_kv_of_older_weights_is_shared() -> None:
    run, samples = _run(), _samples(1, 2)
    run.submit(samples[:1])
    run.poll()
    run.engine.update_weights(dict(_module(1).named_parameters()), 1, "keep_kv")
    run.submit(samples[1:])
    run.drain()
    assert run.engine.load().shared_tokens == 0
    clean = _run(_module(1))
    same_tokens(run.results(samples[1:]), _finish(clean, samples[1:]), 1e-7)


def test_kv_memory_is_bounded_and_overflow_preempts() -> None:
    run, samples = _run(max_running=8, kv_tokens=300), _samples(4, 2, max_new_tokens=120)
    run.submit(samples)
    memory = run.engine._running._memory  # type: ignore[attr-defined]
    most = 0
    while run.open:
        run.poll()
        most = max(most, memory.allocated_tokens)
        assert memory.reserved_tokens <= memory.allocated_tokens <= 300
    assert run.engine.load().preemptions > 0 and most > 200
    same_tokens(run.results(samples), _finish(_run(), samples), 1e-7)


@pytest.mark.parametrize(("kv_tokens", "together"), [(4096, 3), (3 * 96 - 10, 1)])
def test_rows_that_are_full_soon_grow_with_those_that_are_where_there_is_room(
    kv_tokens: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[list[int]] = []
    promote = KvMemory.promote
    monkeypatch.setattr(KvMemory, "promote", lambda memory, slots: (moved.append(list(slots)), promote(memory, slots))[1])
    samples = [sample for size in (6, 9, 12) for sample in _samples(1, 1, num_prompt=size, max_new_tokens=70 - size)]
    samples = [replace(sample, id=GroupId(index, 0, "p0").member(0)) for index, sample in enumerate(samples)]
    run = _run(kv_tokens=kv_tokens, share_prefix=False)
    run.submit(samples)
    run.drain()
    assert len(moved[0]) == together
    same_tokens(run.results(samples), _finish(_run(), samples), 1e-7)


def test_rows_that_end_before_they_are_full_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    promote = KvMemory.promote
    monkeypatch.setattr(KvMemory, "promote", lambda memory, slots: (moved.extend(slots), promote(memory, slots))[1])
    long, short = _samples(2, 1, max_new_tokens=70)
    short = replace(short, spec=replace(short.spec, max_new_tokens=56))  # 6 + 56 = 62 of 64
    run = _run()
    run.submit([long, short])
    run.drain()
    assert moved == [0]


def test_the_oldest_keep_their_kv() -> None:
    run, samples = _run(max_running=8, kv_tokens=200), _samples(3, 1, max_new_tokens=100)
    run.submit(samples)
    run.drain()
    ended = [end.id for end in run.ends]
    assert ended == [sample.id for sample in samples] and run.engine.load().preemptions > 0


def test_weights_of_the_caller_never_leak() -> None:
    module = toy_model("qwen3", dtype=torch.float64)
    run, samples = _run(module), _samples(1, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    same_tokens(_finish(run, samples), _finish(_run(), samples), 1e-7)
    weights = {name: parameter.detach().clone() for name, parameter in _module(1).named_parameters()}
    again = _run()
    again.submit(samples)
    again.poll()
    again.engine.update_weights(weights, 1, "drain")
    for tensor in weights.values():
        tensor.zero_()
    again.drain()
    again.poll()
    assert again.engine.load().version == 1
    renewed = [replace(sample, id=sample.id._replace(serial=9)) for sample in samples]
    fresh = _run(_module(1))
    same_tokens(_finish(again, renewed), _finish(fresh, renewed), 1e-7)


def test_a_drain_admits_nobody_before_the_swap() -> None:
    run, samples = _run(max_running=2), _samples(2, 2)
    run.submit(samples)
    run.poll()
    run.engine.update_weights(dict(_module(1).named_parameters()), 1, "drain")
    run.until(lambda: len(run.ends) == 2)
    assert run.engine.load().version == 1 or run.engine.load().running == 0
    assert run.engine.load().generated_tokens == 80
    run.drain()
    assert [set(sample.versions.tolist()) for sample in run.results(samples)] == [{0}, {0}, {1}, {1}]


def test_the_newest_of_two_pending_updates_wins() -> None:
    run, samples = _run(), _samples(1, 1)
    run.submit(samples)
    run.poll()
    run.engine.update_weights(dict(_module(1).named_parameters()), 1, "drain")
    run.engine.update_weights(dict(_module(2).named_parameters()), 2, "drain")
    assert "version 2" in " ".join(run.engine.pending())
    run.drain()
    run.poll()
    assert run.engine.load().version == 2 and set(run.results(samples)[0].versions.tolist()) == {0}


def test_tokens_are_reported_in_between() -> None:
    run, samples = _run(report_every_tokens=8, steps_per_poll=100), _samples(1, 1)
    run.submit(samples)
    events = run.poll()
    assert [len(event.segment) for event in events if isinstance(event, Progressed) and event.segment] == [8] * 4
    end = events[-1]
    assert isinstance(end, Finished) and end.segment is not None and len(end.segment) == 8 and end.stop == "length"


def test_a_poll_returns_when_a_sample_ends() -> None:
    run = _run(steps_per_poll=1000)
    long, short = _samples(2, 1)
    run.submit([long, replace(short, spec=replace(short.spec, max_new_tokens=5))])
    events = run.poll()
    assert [event.id for event in events] == [short.id] and run.engine.load().generated_tokens == 10


def test_the_context_ends_a_sample() -> None:
    module = toy_model("qwen3", dtype=torch.float64, max_positions=30)
    run = _run(module)
    found = _finish(run, _samples(1, 1, max_new_tokens=100))[0]
    assert len(found) == 24 and found.stop == "length"
    with pytest.raises(EngineError, match="does not fit the context"):
        run.engine.submit(_samples(1, 1, num_prompt=30))


def test_a_prompt_of_one_token_needs_no_prefill() -> None:
    run = _run()
    found = _finish(run, _samples(2, 2, num_prompt=1))
    assert run.engine.load().prefill_tokens == 0 and all(len(sample) == 40 for sample in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": SamplingSpec(max_new_tokens=5000)}, None),
        ({"spec": SamplingSpec(max_new_tokens=200)}, "KV memory"),
        ({"prompt": Prompt("p0", [3, 999])}, "vocabulary"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, Any], message: str | None) -> None:
    run = _run(kv_tokens=4096 if message is None else 100)
    sample = replace(_samples(1, 1)[0], **change)
    if message is None:
        run.engine.submit([sample])
        assert run.engine.load().waiting == 1  # the context, not the budget, is what it is bounded by
    else:
        with pytest.raises(EngineError, match=message):
            run.engine.submit([sample])


def test_stop_strings_need_a_tokenizer() -> None:
    engine = EmbeddedEngine(_module(), clock=VirtualClock())
    with pytest.raises(EngineError, match="tokenizer"):
        engine.submit(_samples(1, 1, stop_strings=("x",)))


def test_the_lean_forward_by_name_refuses_other_models() -> None:
    with pytest.raises(ModelError, match="gpt_neox"):
        EmbeddedEngine(_module(0, torch.float32, "gpt_neox"), clock=VirtualClock(), config=EmbeddedConfig(forward="lean"))


@pytest.mark.parametrize(
    ("kind", "options", "cached"),
    [
        ("gpt_neox", {}, True),
        ("gpt2", {}, True),
        ("olmo2", {}, True),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, True),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, False),
        ("gemma2", {}, False),
    ],
)
def test_other_architectures_use_their_kv_where_it_is_plain(kind: Any, options: dict[str, Any], cached: bool) -> None:
    module = toy_model(kind, dtype=torch.float64, **options)
    forward = transformers_forward(module)
    assert isinstance(forward, CachedTransformersForward) is cached
    run, samples = _run(module), _samples(1, 2, max_new_tokens=12, temperature=0.0)
    for sample in _finish(run, samples):
        ids = torch.from_numpy(sample.prompt.token_ids.astype(np.int64))[None]
        for token in sample.token_ids.tolist():
            assert module(ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_cached_forward_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(0, torch.float32, "gpt_neox")
    assert isinstance(transformers_forward(module), CachedTransformersForward)
    monkeypatch.setattr(KvBucket, "additive_mask", lambda bucket: bucket._mask[: bucket.size, :1, None, : bucket.longest] * 0)
    assert not isinstance(transformers_forward(module), CachedTransformersForward)


def test_both_forwards_sample_the_same() -> None:
    samples = _samples(2, 2, max_new_tokens=15)
    lean, plain = _run(), _run(forward="transformers")
    same_tokens(_finish(lean, samples), _finish(plain, samples), 1e-6)
    assert {segment.sampler for _, segment in lean.segments} == {"embedded-float64"}


def test_bfloat16_runs_and_scores() -> None:
    run = _run(dtype="bfloat16")
    found = _finish(run, _samples(1, 2))
    for sample, score in zip(found, run.engine.score(found), strict=True):
        assert sample.spans[0].sampler == "embedded-bfloat16"
        assert float(np.abs(score - sample.behaviour_logprobs).mean()) < 0.1


def test_counters_use_the_injected_clock() -> None:
    class Ticking(VirtualClock):
        def now(self) -> float:
            self._now += 1.0
            return self._now

    engine = EmbeddedEngine(_module(), clock=Ticking(), config=EmbeddedConfig(max_running=4))
    run = EngineRun(engine)
    _finish(run, _samples(1, 2))
    load = engine.load()
    assert load.busy_s > 0 and load.slot_s == pytest.approx(load.busy_s / 2)


def test_close_drops_everything() -> None:
    run = _run()
    run.submit(_samples(2, 2))
    run.poll()
    run.engine.close()
    assert run.engine.poll() == [] and run.engine.ready_at() is None and run.engine.load().kv_tokens == 0


@pytest.mark.parametrize("spec", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"entropy": True}])
@pytest.mark.parametrize("options", [{}, {"decode_chunk_steps": 4}, {"max_draft_tokens": 3, "draft_match_tokens": 1}])
def test_logits_that_are_not_finite_are_an_error_that_names_a_sample(options: dict[str, Any], spec: dict[str, Any]) -> None:
    run, samples = _run(**options), _samples(2, 2, **spec)
    run.submit(samples)
    run.poll()
    broken = {name: parameter.detach().clone() for name, parameter in _module().named_parameters()}
    broken["model.norm.weight"][3] = float("nan")
    run.engine.update_weights(broken, 7, "recompute")
    with pytest.raises(EngineError, match="logits are not finite") as info:
        run.poll()
    assert info.value.where == str(samples[0].id) and info.value.got == "4 of 4 samples, with weights of version 7"


@pytest.mark.parametrize("forward", ["lean", "transformers"])
@pytest.mark.parametrize("mode", ["drain", "recompute", "keep_kv"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.norm.weight", None, "is missing"),
        ("model.norm.weight", (3,), r"another shape(.|\n)*\(3,\)(.|\n)*\(32,\)"),
        ("model.layers.1.self_attn.q_proj.weight", (3, 5), "another shape"),
        ("model.embed_tokens.weight", (10, 32), "another shape"),
        ("lm_head.weight", (10, 32), "another shape"),
    ],
)
def test_weights_of_another_model_are_refused_at_once_and_change_nothing(
    forward: str, mode: Any, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    run, samples = _run(forward=forward), _samples(1, 2, max_new_tokens=9)
    run.submit(samples)
    run.poll()
    weights: dict[str, Any] = dict(_module(1).named_parameters())
    weights |= {name: torch.zeros(shape)} if shape is not None else {}
    if shape is None:
        del weights[name]
    with pytest.raises(ModelError, match=message) as info:
        run.engine.update_weights(weights, 1, mode)
    assert info.value.where == name
    run.drain()
    assert run.engine.pending() == [] and run.engine.ready_at() is None and run.engine.load().version == 0
    same_tokens(run.results(samples), _finish(_run(forward=forward), samples), 1e-9)


def test_a_drain_that_another_update_overtakes_leaves_nothing_to_wait_for() -> None:
    run, samples = _run(prefill_tokens=1, steps_per_poll=1, share_prefix=False), _samples(1, 2)
    run.submit(samples)
    run.until(lambda: run.engine.load().running == 2)
    run.engine.update_weights(dict(_module(1).named_parameters()), 1, "drain")
    run.engine.update_weights(dict(_module(2).named_parameters()), 2, "recompute")
    run.poll()
    assert (run.engine.load().running, run.engine.load().waiting) == (1, 1), "their KV is made again one by one"
    run.engine.update_weights(dict(_module().named_parameters()), 3, "drain")
    run.drain()
    assert [sorted(set(sample.versions.tolist())) for sample in run.results(samples)] == [[0, 2], [0, 3]]
