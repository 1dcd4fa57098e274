"""Decoding in chunks of steps: the same samples as step by step, and a step that can be captured.

`Tape` stands in for a CUDA graph: it records the operators of one step with their tensors, and a replay runs these operators on
these very tensors. Whatever a step would decide on the host, or read from a tensor that was made after the capture, is wrong
in a replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from april.core.clock import VirtualClock
from april.core.errors import EngineError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded import running
from april.engines.embedded.chunks import Capture, ChunkDecoder, padded_rows
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.models.kv import KvBucket
from april.models.kv_static import StaticRows
from april.testing.engine_run import EngineRun, cut, same_tokens
from april.testing.toy_model import CharTokenizer, ToyKind, toy_model

_ON_THE_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Tape(TorchDispatchMode):
    """The operators of one step; refuses those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in _ON_THE_HOST:
            raise EngineError("a captured step looks at values on the host", got=str(function))
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        """Run the same operators on the same tensors."""
        self.num_replays += 1
        for function, args, kwargs, out in self.calls:
            fresh = function(*args, **kwargs)
            pairs = zip(_tensors(out), _tensors(fresh), strict=True)
            for old, new in pairs:
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [part for part in found if isinstance(part, torch.Tensor)]


def tape_capture(tapes: list[Tape]) -> Capture:
    """A `Capture` that records, and keeps its tapes in a list."""

    def capture(step: Any) -> Any:
        tape = Tape()
        with tape:
            step()
        tapes.append(tape)
        return tape.replay

    return capture


@lru_cache
def _module(seed: int = 0, dtype: torch.dtype = torch.float64, kind: ToyKind = "qwen3") -> Any:
    return toy_model(kind, dtype=dtype, seed=seed)


def _run(module: Any = None, **options: Any) -> EngineRun:
    config = EmbeddedConfig(**({"max_running": 8, "kv_tokens": 4096, "steps_per_poll": 8} | options))
    return EngineRun(EmbeddedEngine(module or _module(), tokenizer=CharTokenizer(), clock=VirtualClock(), config=config))


def _samples() -> list[Sample]:
    """Three groups of three, with lengths, stops and ways of sampling of their own; rows come to need three classes."""
    specs = [
        SamplingSpec(max_new_tokens=90, stop_token_ids=(0, 3)),
        SamplingSpec(max_new_tokens=61, temperature=1.3, top_p=0.9, seed=5),
        SamplingSpec(max_new_tokens=37, temperature=0.0, entropy=True),
    ]
    samples = []
    for serial, spec in enumerate(specs):
        prompt = Prompt(f"p{serial}", np.arange(2, 8 + 20 * serial) % 40)
        samples += [Sample(GroupId(serial, 0, prompt.id).member(member), prompt, spec) for member in range(3)]
    return samples


def _finish(run: EngineRun, samples: Sequence[Sample]) -> list[Sample]:
    run.submit(samples)
    run.drain()
    return run.results(samples)


@lru_cache
def _step_by_step(dtype: torch.dtype = torch.float64, kind: ToyKind = "qwen3") -> tuple[Sample, ...]:
    return tuple(_finish(_run(_module(0, dtype, kind)), _samples()))


def _same(found: Sequence[Sample], expected: Sequence[Sample], tolerance: float) -> None:
    same_tokens(found, expected, tolerance)
    assert [sample.token_ids.tolist() for sample in found] == [sample.token_ids.tolist() for sample in expected]
    assert [sample.stop for sample in found] == [sample.stop for sample in expected]


@pytest.mark.parametrize("num_steps", [2, 5, 16, 100])
def test_chunks_give_the_samples_of_single_steps(num_steps: int) -> None:
    whole = _step_by_step()
    assert {sample.stop for sample in whole} == {"eos", "length"}, "some rows end inside a chunk, by a stop token and by length"
    run = _run(decode_chunk_steps=num_steps)
    found = _finish(run, _samples())
    _same(found, whole, 1e-9)
    greedy = [sample.entropies for sample in found[6:]]
    assert [part.tolist() for part in greedy if part is not None] == [[0.0] * 37] * 3
    assert run.engine.load().generated_tokens == sum(map(len, whole))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_chunks_in_float32(kind: ToyKind) -> None:
    found = _finish(_run(_module(0, torch.float32, kind), decode_chunk_steps=7), _samples())
    assert [len(sample) for sample in found] == [len(sample) for sample in _step_by_step(torch.float32, kind)]
    same_tokens(found, _step_by_step(torch.float32, kind), 1e-4)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_resumed_and_preempted_rows_continue_in_chunks(data: st.DataObject) -> None:
    whole = _step_by_step()
    run = _run(
        max_running=data.draw(st.integers(1, 9)),
        kv_tokens=data.draw(st.sampled_from([256, 600, 4096])),
        decode_chunk_steps=data.draw(st.integers(2, 40)),
        report_every_tokens=data.draw(st.sampled_from([3, 256])),
    )
    for index in data.draw(st.permutations(range(9))):
        run.submit([cut(whole[index], data.draw(st.integers(0, len(whole[index]) - 1)))])
        if data.draw(st.booleans()):
            run.poll()
    run.drain()
    _same(run.results(whole), whole, 1e-7)
    assert [len(sample) for sample in run.results(whole)] == [len(sample) for sample in whole]


def test_a_stop_string_inside_a_chunk_ends_the_sample_there() -> None:
    sample = _samples()[3]
    text = CharTokenizer().decode(_step_by_step()[3].token_ids.tolist())
    stop = text[9:12]
    assert stop not in text[:11]
    spec = SamplingSpec(max_new_tokens=61, temperature=1.3, top_p=0.9, seed=5, stop_strings=(stop,))
    found = _finish(_run(decode_chunk_steps=8), [Sample(sample.id, sample.prompt, spec)])[0]
    assert (found.stop, CharTokenizer().decode(found.token_ids.tolist())) == ("stop", text[:12])


def test_a_stop_token_ends_a_row_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, decode = [], ChunkDecoder.decode

    def watched(self: ChunkDecoder, buckets: Any, rows: Any) -> Any:
        values, counts = decode(self, buckets, rows)
        seen.extend(zip(values[0].astype(int).tolist(), counts.tolist(), rows.stop_ids.tolist(), rows.left.tolist(), strict=True))
        return values, counts

    monkeypatch.setattr(ChunkDecoder, "decode", watched)
    _finish(_run(decode_chunk_steps=8), _samples())
    stopped = 0
    for tokens, count, stops, left in seen:
        ends = [place for place, token in enumerate(tokens[:left]) if token in stops]
        assert count == (ends[0] + 1 if ends else left)
        stopped += bool(ends) and ends[0] + 1 < left
    assert stopped, "some row stops inside a chunk"


@pytest.mark.parametrize("taped", [False, True])
def test_a_combination_that_comes_again_in_moved_memory_is_prepared_anew(taped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, prompt = SamplingSpec(max_new_tokens=56), Prompt("p", np.arange(2, 8))
    short = SamplingSpec(max_new_tokens=9)
    samples = [Sample(GroupId(0, 0, "p").member(member), prompt, spec if member < 2 else short) for member in range(8)]
    expected = _finish(_run(), samples)
    tapes: list[Tape] = []
    run = _taped_run(monkeypatch, 4, tapes, steps_per_poll=16) if taped else _run(decode_chunk_steps=4, steps_per_poll=16)
    run.submit(samples[:2])
    run.poll()
    run.submit(samples[2:])  # the bucket grows from two rows to eight, and two are left again
    run.drain()
    _same(run.results(samples), expected, 1e-9)
    assert bool(tapes) == taped


def _taped_run(monkeypatch: pytest.MonkeyPatch, num_steps: int, tapes: list[Tape], **options: Any) -> EngineRun:
    monkeypatch.setattr(
        running,
        "make_chunks",
        lambda forward, config, longest: ChunkDecoder(forward, config.decode_chunk_steps, longest, tape_capture(tapes)),
    )
    return _run(decode_chunk_steps=num_steps, **options)


def test_replays_of_recorded_steps_give_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes: list[Tape] = []
    run = _taped_run(monkeypatch, 4, tapes)
    _same(_finish(run, _samples()), _step_by_step(), 1e-9)
    assert len(tapes) > 1, "several combinations of rows came often enough"
    assert min(tape.num_replays for tape in tapes) >= 1 and sum(tape.num_replays for tape in tapes) > 20


def test_a_replay_sees_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes: list[Tape] = []
    other = _module(1)
    expected = _finish(_run(other), _samples()[:2])
    run = _taped_run(monkeypatch, 4, tapes)
    _finish(run, _samples()[:2])
    recorded = len(tapes)
    run.engine.update_weights(dict(other.named_parameters()), 1)
    before = sum(tape.num_replays for tape in tapes)
    again = [Sample(sample.id, sample.prompt, sample.spec) for sample in _samples()[:2]]
    run.submit(again)
    run.drain()
    _same(run.results(again), expected, 1e-9)
    assert recorded and sum(tape.num_replays for tape in tapes[:recorded]) > before, "captures outlive the weights"


def test_the_tape_notices_what_a_graph_could_not_replay() -> None:
    """The negative control of the tests above."""
    values, seen = torch.arange(3.0), []

    def looks() -> None:
        if float(values.sum()) > 1:
            seen.append(1)

    with pytest.raises(EngineError, match="on the host"), Tape():
        looks()
    scale, out, tape = [torch.ones(1)], torch.zeros(1), Tape()
    with tape:
        out.copy_(scale[0] * 2)
    scale[0] = torch.full((1,), 5.0)
    tape.replay()
    assert out.item() == 2.0 and not seen


@pytest.mark.parametrize("options", [{}, {"decode_chunk_steps": 6}, {"max_draft_tokens": 3, "draft_match_tokens": 1}])
def test_memory_that_was_never_written_is_never_seen(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, resize = _step_by_step(), KvBucket.resize

    def resize_with_rubbish(bucket: KvBucket, rows: int) -> None:
        resize(bucket, rows)
        bucket.data[:, :, bucket.size :] = float("nan")

    monkeypatch.setattr(KvBucket, "resize", resize_with_rubbish)
    found = _finish(_run(**options), _samples())
    _same(found, expected, 1e-9)
    assert all(np.isfinite(sample.behaviour_logprobs).all() for sample in found)


def test_padding_rows_draw_nothing_and_disturb_nobody() -> None:
    bucket = KvBucket(1, 1, 2, 4, torch.float64, torch.device("cpu"))
    bucket.resize(4)
    generator = torch.Generator().manual_seed(0)
    source = torch.rand((1, 2, 1, 2, 2), generator=generator, dtype=torch.float64)
    for _ in range(2):
        bucket.insert(source, 2)
    new, query = (torch.rand((3, heads, 2), generator=generator, dtype=torch.float64) for heads in (2, 2))
    rows = StaticRows(bucket, 3)
    rows.begin_step(torch.tensor([2, 1, 0]))
    rows.write(0, new)
    out = rows.attend(0, query, 1.0)
    # Row 0 sees places 0 to 2, row 1 places 0 and 1 (it stands still at place 1), the padding row its own place only.
    for row, length in ((0, 3), (1, 2), (2, 1)):
        key, value = bucket.data[0, :, row, 0, :length]
        expected = torch.softmax(query[row] @ key.T, -1) @ value
        torch.testing.assert_close(out[row].view(2, 2), expected)
    torch.testing.assert_close(bucket.data[0, 0, 1, 0], torch.stack((source[0, 0, 0, 0], new[1, 0], *torch.zeros(2, 2).double())))
    assert rows.is_current
    bucket.resize(5)
    assert not rows.is_current


@pytest.mark.parametrize(
    ("size", "current", "most", "expected"),
    [
        (1, 0, 8, 1),
        (5, 0, 8, 6),
        (7, 0, 8, 8),
        (7, 0, 7, 7),
        (5, 8, 8, 8),
        (3, 8, 8, 3),
        (9, 8, 64, 12),
        (33, 0, 64, 48),
        (4, 8, 6, 4),
    ],
)
def test_padded_rows_keep_their_number_while_it_is_half_used(size: int, current: int, most: int, expected: int) -> None:
    assert padded_rows(size, current, most) == expected


def test_few_numbers_of_rows_cover_all() -> None:
    fresh = [padded_rows(size, 0, 10**6) for size in range(1, 513)]
    assert all(size <= rows < 1.5 * size + 1 for size, rows in enumerate(fresh, start=1))
    assert len(Counter(fresh)) == 18


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(EngineError, match="CUDA graphs need a CUDA device") as info:
        _run(cuda_graphs=True)
    assert info.value.where == "engine.cuda_graphs"
    with pytest.raises(EngineError, match="lean forward"):
        _run(toy_model("gpt_neox"), decode_chunk_steps=2)
    with pytest.raises(ValueError, match="needs a look at every step"):
        EmbeddedConfig(decode_chunk_steps=2, max_draft_tokens=3)
