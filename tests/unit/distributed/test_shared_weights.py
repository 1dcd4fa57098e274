"""Weights in shared memory: a version is there whole or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from april.core.errors import ProcessError, ResourceError
from april.core.metric import values
from april.distributed import shared_weights
from april.distributed.channel import Channel
from april.distributed.child import Child, Launch
from april.distributed.layout import Layout
from april.distributed.shared_weights import WeightBuffer
from april.distributed.transport import Moved, NotYet, Overwritten


def weights_of(number: float) -> dict[str, torch.Tensor]:
    return {
        "scale": torch.full((), number, dtype=torch.float64),
        "matrix": torch.full((3, 5), number, dtype=torch.float32),
        "half": torch.full((7,), number, dtype=torch.bfloat16),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tensors_lie_one_after_the_other_and_come_back() -> None:
    layout = Layout.of(weights_of(0))
    assert [place.offset for place in layout.places.values()] == [0, 64, 128]
    assert layout.num_bytes == 192
    buffer = WeightBuffer(layout)
    assert not buffer.holds(0) and not buffer.holds(1)
    buffer.write(weights_of(1.5), 0)
    buffer.write(weights_of(2.5), 1)
    assert same(buffer.view(0), weights_of(1.5)) and same(buffer.view(1), weights_of(2.5))
    assert buffer.view(1).version == 1 and buffer.view(1).transport is buffer


def test_the_version_that_is_served_stays_while_the_next_is_written() -> None:
    buffer = WeightBuffer(Layout.of(weights_of(0)))
    buffer.write(weights_of(4), 4)
    served = buffer.view(4)
    buffer.write(weights_of(5), 5)
    assert same(served, weights_of(4))
    buffer.write(weights_of(6), 6)
    assert not same(served, weights_of(4)), "negative control: the one after the next takes its place"
    with pytest.raises(ProcessError, match="not in shared memory") as caught:
        buffer.view(4)
    assert "versions [6, 5]" in str(caught.value.got)


def test_a_half_written_version_is_refused() -> None:
    buffer = WeightBuffer(Layout.of(weights_of(0)))
    buffer.write(weights_of(2), 2)

    class Torn(dict[str, torch.Tensor]):
        def items(self) -> Any:
            yield "scale", torch.full((), 9.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        buffer.write(Torn(weights_of(9)), 4)
    assert not buffer.holds(2) and not buffer.holds(4)
    buffer.write(weights_of(4), 4)
    assert buffer.holds(4) and same(buffer.view(4), weights_of(4)), "the next writer makes it whole"


def test_a_reader_notices_that_it_was_overtaken() -> None:
    buffer = WeightBuffer(Layout.of(weights_of(0)))
    buffer.write(weights_of(1), 1)
    with buffer.reading(1) as weights:
        assert same(weights, weights_of(1))
    with pytest.raises(Overwritten, match="version 1 of the weights was written over"), buffer.reading(1):
        buffer.write(weights_of(3), 3)
    with pytest.raises(NotYet, match="not in shared memory"), buffer.reading(1):
        pytest.fail("version 1 was passed")


def test_other_tensors_are_refused_and_memory_can_be_short(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = WeightBuffer(Layout.of(weights_of(0)))
    with pytest.raises(ProcessError, match="do not fit") as caught:
        buffer.write({"other": torch.zeros(1)}, 0)
    assert "1 tensors" in str(caught.value.got)

    def full(_fd: int, _start: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_weights.os, "posix_fallocate", full, raising=False)
    with pytest.raises(ResourceError, match="too little memory"):
        WeightBuffer(Layout.of(weights_of(0)))


def test_bytes_and_seconds_are_measured() -> None:
    buffer = WeightBuffer(Layout.of(weights_of(0)))
    seconds, num_bytes = buffer.write(weights_of(1), 1)
    assert seconds >= 0 and num_bytes == 192
    buffer.took("write", Moved(0.5, 192))
    buffer.took("write", Moved(1.5, 192))
    buffer.took("read", Moved(0.25, 192))
    assert values(buffer.take_metrics()) == {
        "weights_bytes": 192.0,
        "weights_write_s": 1.0,
        "weights_read_bytes": 192.0,
        "weights_read_s": 0.25,
    }
    assert values(buffer.take_metrics()) == {}


def write_next(channel: Channel, buffer: WeightBuffer) -> None:
    """A child: checks what it finds, and writes the next version."""
    assert buffer.holds(1)
    buffer.write({name: tensor + 1 for name, tensor in buffer.view(1).items()}, 2)
    channel.send("written")
    channel.wait(None)


def test_another_process_sees_the_same_memory() -> None:
    buffer = WeightBuffer(Layout.of(weights_of(0)))
    buffer.write(weights_of(1), 1)
    child = Child(Launch("writer", write_next, (buffer,)))
    assert child.channel.wait(120.0) and child.channel.receive() == ["written"]
    child.close()
    assert same(buffer.view(2), weights_of(2)), "it stays when the writer is gone"
