"""The engine in front of a vLLM server, against a server that answers like one and fails on demand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("httpx2", reason="the HTTP client that comes with huggingface_hub is not installed")

from april.api import resolve_recipe
from april.core.clock import WallClock, readable
from april.core.errors import EngineError, ProcessError, RecipeError
from april.core.event import Broken, Finished, Parked
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec
from april.engines.vllm.config import VllmServerConfig
from april.engines.vllm.engine import check_version
from april.engines.vllm.server import ServerLost, VllmServerEngine
from april.engines.vllm.server_request import ServerRequest
from april.engines.vllm.start import can_sleep
from april.engines.vllm.wire import Garbage, VersionSpan
from april.run.processes import in_child, one_of, replicas_of
from april.testing.engine_run import EngineRun
from april.testing.toy_model import CharTokenizer, toy_model
from tests.unit.engines.fake_vllm import FakeVllm

MODULE = toy_model("qwen3", dtype=torch.float32, seed=0, hidden_size=32, tied=True)


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    fake = FakeVllm()
    yield fake
    fake.close()


@pytest.fixture
def start(fake: FakeVllm, tmp_path: Path) -> Iterator[Callable[..., EngineRun]]:
    engines: list[VllmServerEngine] = []

    def make(**options: Any) -> EngineRun:
        config = VllmServerConfig(urls=(fake.url,), weights_folder=str(tmp_path), **{"report_every_tokens": 4, **options})
        engines.append(VllmServerEngine(MODULE, tokenizer=CharTokenizer(), clock=WallClock(), config=config))
        return EngineRun(engines[-1], wait)

    yield make
    for engine in engines:
        engine.close()


def wait(engine: Any) -> None:
    ready_s = engine.ready_at()
    if ready_s is not None:
        readable(engine.waitables(), max(0.0, ready_s - engine._clock.now()))


def sample(member: int = 0, **spec: Any) -> Sample:
    prompt = Prompt("p", np.asarray([5, 6, 7], np.int32))
    return Sample(GroupId(0, 0, "p").member(member), prompt, SamplingSpec(**{"max_new_tokens": 12, **spec}))


def test_tokens_log_probs_and_versions_are_the_servers(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    run = start()
    run.submit([sample()])
    run.drain()
    result = run.samples[sample().id]
    assert result.token_ids.tolist() == list(range(2, 14)) and result.stop == "length"
    assert result.behaviour_logprobs[:2].tolist() == pytest.approx([-0.01, -0.02])
    assert [(span.version, span.sampler) for span in result.spans] == [(0, "vllm-float32")]
    load = run.engine.load()
    assert (load.generated_tokens, load.prefill_tokens, load.shared_tokens, load.running) == (12, 2, 1, 0)
    body = fake.bodies[0]
    assert body["token_ids"] == [5, 6, 7] and body["cache_salt"] == "version-0" and body["priority"] == 1
    assert body["sampling_params"]["max_tokens"] == 12 and body["sampling_params"]["ignore_eos"]


def test_all_samples_of_a_call_run_or_none(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    run = start()
    refused = {
        "it is running already": [sample(0), sample(0)],
        "nothing is left to generate": [sample(0), sample(1).finished("eos")],
        "leave no room in a context of 128": [sample(0), sample(1, max_new_tokens=200).extended(tokens(125))],
        "50000": [sample(0), sample(1).extended(tokens(1, first=50_000))],
    }
    for told, samples in refused.items():
        with pytest.raises(EngineError) as caught:
            run.engine.submit(samples)
        assert told in str(caught.value.got)
    assert run.engine.load().running + run.engine.load().waiting == 0 and not fake.bodies
    run.submit([sample(0)])
    with pytest.raises(EngineError, match="it is running already"):
        run.engine.submit([sample(0)])
    run.drain()


def tokens(count: int, first: int = 2) -> Segment:
    return Segment(np.full(count, first, np.int32), np.full(count, -1.0, np.float32), 0, "s")


def test_a_resumed_sample_is_a_prompt_with_its_tokens(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    fake.waits = {0}
    run = start()
    run.submit([sample()])
    run.until_tokens(4)
    run.engine.abort()
    run.drain()
    assert isinstance(run.ends[0], Parked) and len(run.samples[sample().id]) == 4
    run.submit([run.samples[sample().id]])
    run.drain()
    assert fake.bodies[1]["token_ids"] == [5, 6, 7, 2, 3, 4, 5] and fake.bodies[1]["sampling_params"]["max_tokens"] == 8
    assert fake.bodies[1]["request_id"] != fake.bodies[0]["request_id"]


def test_an_update_is_a_file_between_pause_and_resume(fake: FakeVllm, start: Callable[..., EngineRun], tmp_path: Path) -> None:
    run = start()
    former, read = fake.called, {}

    def reading(path: str, body: Any) -> None:
        if path.startswith("/update_weights"):
            read.update(load_file(body["update_info"]["file"]))
        former(path, body)

    fake.called = reading  # type: ignore[method-assign]
    tied = torch.ones(2, 3)
    weights = {"a": torch.ones(2, 3), "model.embed_tokens.weight": tied, "lm_head.weight": tied}
    run.engine.update_weights(weights, 7, "recompute")
    run.until(lambda: run.engine.load().version == 7)
    names = [path for path, _ in fake.calls]
    assert names[-5:] == ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
    assert read["a"].tolist() == [[1.0] * 3] * 2 and fake.version == "7"
    assert sorted(read) == ["a", "model.embed_tokens.weight"], "a tied tensor is sent once, under both names"
    assert fake.calls[-3][1]["update_info"]["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not list(tmp_path.glob("*/*")), "what the server has read is gone"


def test_recompute_goes_on_under_new_weights(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    fake.waits = {0}
    run = start()
    run.submit([sample()])
    run.until_tokens(4)
    run.engine.update_weights({"a": torch.ones(1)}, 1, "recompute")
    run.drain()
    result = run.samples[sample().id]
    assert result.versions.tolist() == [0] * 4 + [1] * 8 and {span.sampler for span in result.spans} == {"vllm-float32"}
    assert len(run.ends) == 1 and isinstance(run.ends[0], Finished), "nobody parked it"
    assert [body["cache_salt"] for body in fake.bodies] == ["version-0", "version-1"]


def test_keep_kv_books_by_the_servers_spans(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    fake.waits = {0}
    run = start()
    run.submit([sample()])
    run.until_tokens(4)
    run.engine.update_weights({"a": torch.ones(1)}, 1, "keep_kv")
    run.drain()
    result = run.samples[sample().id]
    assert result.versions.tolist() == [0] * 4 + [1] * 8 and len(fake.bodies) == 1
    assert [span.sampler for span in result.spans] == ["vllm-float32", "vllm-float32+mixed-kv"]


@pytest.mark.parametrize(("fault", "told"), [("unversioned", "versions none"), ("short", r"versions 0 of \[0, 4\)")])
def test_tokens_of_unknown_weights_are_not_booked(fake: FakeVllm, start: Callable[..., EngineRun], fault: str, told: str) -> None:
    fake.waits, fake.faults = {0}, {0: fault}
    run = start()
    run.submit([sample()])
    run.until_tokens(4)
    run.engine.update_weights({"a": torch.ones(1)}, 1, "keep_kv")
    run.drain()
    (end,) = run.ends
    assert isinstance(end, Broken) and re.search(f"{told} of 12 tokens", end.reason)
    assert run.samples[sample().id].versions.tolist() == [0] * 4, "what came before the update is of the old weights"


def test_one_version_needs_no_spans(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    fake.faults = {0: "unversioned"}
    run = start()
    run.submit([sample()])
    run.drain()
    assert run.samples[sample().id].versions.tolist() == [0] * 12


Spans = list[tuple[str, int, int]]


@pytest.mark.parametrize(
    ("spans", "versions"),
    [
        ([("3", 0, 2), ("4", 2, 6)], [3, 3, 4, 4, 4, 4]),
        ([("3", 0, 2), ("4", 2, 9)], [3, 3, 4, 4, 4, 4]),
        ([("4", 0, 6)], [4, 4, 4, 4, 4, 4]),
        ([], None),
        ([("3", 0, 2), ("4", 2, 5)], None),
        ([("3", 0, 2), ("4", 3, 6)], None),
        ([("3", 1, 6)], None),
    ],
    ids=["two", "more than was kept", "one", "none", "an early end", "a gap", "a late start"],
)
def test_spans_of_a_crossed_request_hold_every_token(spans: Spans, versions: list[int] | None) -> None:
    request = ServerRequest(0, sample(), "me")
    request.version, request.crossed = 3, True
    request.extend([5] * 6, [-1.0] * 6, None)
    found = tuple(VersionSpan(*span) for span in spans)
    if versions is None:
        with pytest.raises(Garbage, match="of 6 tokens"):
            request.settled(found, "s")
    else:
        segments = request.settled(found, "s")
        assert [segment.version for segment in segments for _ in segment.token_ids] == versions


def test_a_reply_without_a_version_is_no_reply_of_this_version() -> None:
    check_version([VersionSpan("1", 0, 2), VersionSpan("2", 2, 3)], 2, sample().id)
    for spans in (None, [], [VersionSpan("1", 0, 3)]):
        with pytest.raises(EngineError, match="other weights than were published"):
            check_version(spans, 2, sample().id)


def test_drain_waits_and_starts_nothing(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    fake.waits = {0}
    run = start(max_running=1)
    run.submit([sample(0), sample(1)])
    run.until_tokens(4)
    run.engine.update_weights({"a": torch.ones(1)}, 1, "drain")
    run.poll()
    assert len(fake.bodies) == 1 and run.engine.load().version == 0
    fake.called("/resume", None)
    run.drain()
    assert [set(run.samples[sample(member).id].versions.tolist()) for member in (0, 1)] == [{0}, {1}]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("garbage", "garbage"),
        ("infinite", "garbage: OverflowError"),
        ("half", "the connection broke"),
        ("refused", "refused it: 400"),
        ("error", "out of luck"),
        ("unended", "the stream ended before the sample"),
    ],
)
def test_a_broken_stream_costs_one_sample_its_life(
    fake: FakeVllm, start: Callable[..., EngineRun], fault: str, told: str
) -> None:
    fake.faults = {0: fault}
    run = start()
    run.submit([sample(0)])
    run.until(lambda: len(fake.bodies) == 1)
    run.submit([sample(1)])
    run.drain()
    broken = next(end for end in run.ends if isinstance(end, Broken))
    assert broken.id == sample(0).id and told in broken.reason
    assert len(run.samples[broken.id]) == (0 if fault == "refused" else 4), "what was streamed stays"
    assert run.samples[sample(1).id].stop == "length", "the other sample does not notice"
    run.submit([run.samples[broken.id]])
    run.drain()
    assert run.samples[broken.id].token_ids.shape == (12,)


@pytest.mark.parametrize(("fault", "told"), [("die", "not well"), ("hang", "said nothing for")])
def test_a_server_that_is_gone_is_told_after_its_tokens(
    fake: FakeVllm, start: Callable[..., EngineRun], fault: str, told: str
) -> None:
    fake.faults = {0: fault}
    run = start(silence_s=0.2, report_every_tokens=100)
    run.submit([sample(0)])
    with pytest.raises(ServerLost, match=told):
        run.drain()
    assert len(run.samples[sample(0).id]) == 4 and not run.ends, "whoever watches the process says what becomes of them"


def test_other_weights_than_published_are_noticed(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    fake.faults = {0: "elsewhere"}
    run = start()
    run.submit([sample()])
    with pytest.raises(EngineError, match="other weights than were published"):
        run.drain()
    assert not run.ends


def test_a_stop_string_cuts_the_stream(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    fake.waits = {0}
    text = CharTokenizer().decode([2, 3, 4])
    run = start()
    run.submit([sample(stop_strings=(text,))])
    run.drain()
    result = run.samples[sample().id]
    assert result.stop == "stop" and result.token_ids.tolist() == [2, 3, 4]
    assert fake.aborted == {fake.bodies[0]["request_id"]}


def test_a_server_that_can_sleep_does_so_without_samples(fake: FakeVllm, start: Callable[..., EngineRun]) -> None:
    assert not start().engine.caps.sleeps
    fake.served["model_config"]["enable_sleep_mode"] = True
    fake.waits = {0}
    run = start()
    engine: Any = run.engine
    assert engine.caps.sleeps
    run.submit([sample()])
    with pytest.raises(EngineError, match="with samples cannot sleep"):
        engine.sleep()
    engine.abort()
    run.drain()
    engine.sleep()
    engine.wake()
    assert [path for path, _ in fake.calls][-2:] == ["/sleep", "/wake_up"]

    def break_connection(path: str, body: Any) -> None:
        raise ConnectionAbortedError

    fake.called = break_connection  # type: ignore[method-assign]
    with pytest.raises(ServerLost, match="does not take a call"):
        engine.sleep()


def test_nothing_sleeps_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VllmServerConfig(sleeps=True)
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert can_sleep(config) is cuda and not can_sleep(VllmServerConfig())


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("model_config", "logprobs_mode", "raw_logprobs", "--logprobs-mode"),
        ("weight_transfer_config", "backend", "nccl", "--weight-transfer-config"),
    ],
)
def test_a_server_that_cannot_be_trained_with_is_refused(
    fake: FakeVllm, start: Callable[..., EngineRun], section: str, key: str, value: str, told: str
) -> None:
    fake.served[section][key] = value
    with pytest.raises(EngineError, match=told):
        start()
    fake.served = {}
    with pytest.raises(ProcessError, match="VLLM_SERVER_DEV_MODE"):
        start()
    assert not fake.calls, "nothing was done to it"


@pytest.mark.parametrize("kind", ["vllm", "vllm_server"])
@pytest.mark.parametrize("gib", [0.5, 1.5])
def test_memory_that_vllm_would_round_is_refused(kind: str, gib: float) -> None:
    with pytest.raises(RecipeError, match="memory_gib"):
        resolve_recipe("quickstart", [], [f"engine.type={kind}", f"engine.memory_gib={gib}"])
    assert resolve_recipe("quickstart", [], [f"engine.type={kind}", "engine.memory_gib=2"]).recipe.engine.memory_gib == 2  # type: ignore[union-attr]


def test_as_many_engines_as_urls() -> None:
    urls = "engine.urls=['http://a', 'http://b']"
    recipe = resolve_recipe("quickstart", [], ["engine.type=vllm_server", urls]).recipe
    assert replicas_of(recipe) == 2 and in_child(recipe, "engine")
    own = [one_of(recipe, f"vllm_server {index}").engine for index in range(2)]
    assert [(engine.urls, engine.replicas) for engine in own] == [(("http://a",), 1), (("http://b",), 1)]  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="replicas = 3"):
        resolve_recipe("quickstart", [], ["engine.type=vllm_server", urls, "engine.replicas=3"])
