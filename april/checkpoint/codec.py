"""Core data as bytes and back, exactly: a JSON header and the raw arrays behind it.

Prompts are saved by id: they come back from the data set, which the recipe makes again.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from april.core.errors import CheckpointError
from april.core.group import Failure, Reward
from april.core.ids import GroupId, SampleId
from april.core.prompt import Prompt
from april.core.sample import Parent, Sample, Segment, Span
from april.core.sampling import AdaptiveTemperature, SamplingSpec

_TUPLES: dict[str, Any] = {cls.__name__: cls for cls in (GroupId, SampleId, Span, Parent)}
_DATACLASSES: dict[str, Any] = {
    cls.__name__: cls for cls in (AdaptiveTemperature, SamplingSpec, Segment, Sample, Reward, Failure)
}
_FRAME = struct.Struct("<III")
"""Length of the payload, its CRC-32, and the CRC-32 of these two: a length that changed is not taken for a torn tail."""
_SUMMED_BYTES = 8
_HEADER = struct.Struct("<I")


def encode(value: Any) -> bytes:
    """One value (core data, JSON data, numpy arrays, nested at will) as a checked frame."""
    arrays: list[npt.NDArray[Any]] = []
    header = json.dumps(_to_json(value, arrays), separators=(",", ":"), allow_nan=True).encode()
    payload = b"".join([_HEADER.pack(len(header)), header, *(np.ascontiguousarray(array).tobytes() for array in arrays)])
    sizes = struct.pack("<II", len(payload), zlib.crc32(payload))
    return b"".join([sizes, struct.pack("<I", zlib.crc32(sizes)), payload])


def decode_frames(data: bytes, where: str, prompts: Mapping[str, Prompt], torn_tail: bool = False) -> list[Any]:
    """All values of a sequence of frames.

    Args:
        data: frames one after the other.
        where: file name, for messages.
        prompts: the data set, by id.
        torn_tail: whether an incomplete last frame, or one with a damaged payload, is the end (a journal cut by a crash) or an
            error.

    Raises:
        CheckpointError: a frame is damaged (with `torn_tail`, only a header, or a payload that is not the last), or the data set
            lacks a prompt.
    """
    return [_decode(payload, prompts) for _, payload in _payloads(data, where, torn_tail)]


def intact_length(data: bytes, where: str) -> int:
    """Bytes up to the end of the last whole frame of a journal.

    Raises:
        CheckpointError: what is behind it is no torn tail.
    """
    return max((end for end, _ in _payloads(data, where, torn_tail=True)), default=0)


def _payloads(data: bytes, where: str, torn_tail: bool) -> Iterator[tuple[int, bytes]]:
    """The end and the payload of every whole frame."""
    at = 0
    while at < len(data):
        if torn_tail and not any(data[at : at + _FRAME.size]) and not any(data[at:]):
            return  # a file that grew, and whose last pages did not reach the disk
        start = at + _FRAME.size
        cut = start > len(data)
        if not cut:
            length, checksum, own = _FRAME.unpack_from(data, at)
            payload = data[start : start + length]
            if zlib.crc32(data[at : at + _SUMMED_BYTES]) == own:
                if len(payload) == length and zlib.crc32(payload) == checksum:
                    at = start + length
                    yield at, payload
                    continue
                cut = start + length >= len(data)
        if cut and torn_tail:
            return
        raise CheckpointError("a saved file is damaged", where=where, got=f"a bad frame at byte {at}", expected="intact frames")


def _to_json(value: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        arrays.append(value)
        return {"$array": [value.dtype.str, list(value.shape)]}
    name = type(value).__name__
    if isinstance(value, Prompt):
        return {"$prompt": value.id}
    if name in _TUPLES and isinstance(value, _TUPLES[name]):
        return {"$": name, "of": [_to_json(part, arrays) for part in value]}
    if name in _DATACLASSES and isinstance(value, _DATACLASSES[name]):
        return {"$": name, "of": {f.name: _to_json(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}}
    if isinstance(value, dict):
        return {"$dict": [[_to_json(key, arrays), _to_json(inner, arrays)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return (
            {"$tuple": [_to_json(part, arrays) for part in value]}
            if isinstance(value, tuple)
            else [_to_json(p, arrays) for p in value]
        )
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        "a value cannot be saved", got=type(value), expected="core data, numbers, strings, lists, tables or arrays"
    )


def _decode(payload: bytes, prompts: Mapping[str, Prompt]) -> Any:
    (length,) = _HEADER.unpack_from(payload)
    header = json.loads(payload[_HEADER.size : _HEADER.size + length])
    return _from_json(header, _Reader(payload, _HEADER.size + length, prompts))


class _Reader:
    def __init__(self, payload: bytes, at: int, prompts: Mapping[str, Prompt]) -> None:
        self.payload, self.at, self.prompts = payload, at, prompts

    def prompt(self, name: str) -> Prompt:
        try:
            return self.prompts[name]
        except KeyError:
            raise CheckpointError(
                "a saved prompt is not in the data set any more",
                got=name,
                hint="continue with the data set that the run began with",
            ) from None

    def array(self, dtype: str, shape: list[int]) -> npt.NDArray[Any]:
        count = int(np.prod(shape, dtype=np.int64))
        array: npt.NDArray[Any] = np.frombuffer(self.payload, np.dtype(dtype), count, self.at).reshape(shape)
        self.at += array.nbytes
        return array


def _from_json(value: Any, reader: _Reader) -> Any:
    if isinstance(value, list):
        return [_from_json(part, reader) for part in value]
    if not isinstance(value, dict):
        return value
    if "$array" in value:
        return reader.array(*value["$array"])
    if "$tuple" in value:
        return tuple(_from_json(part, reader) for part in value["$tuple"])
    if "$dict" in value:
        return {_from_json(key, reader): _from_json(inner, reader) for key, inner in value["$dict"]}
    if "$prompt" in value:
        return reader.prompt(value["$prompt"])
    name, parts = value["$"], value["of"]
    if name in _TUPLES:
        return _TUPLES[name](*(_from_json(part, reader) for part in parts))
    return _DATACLASSES[name](**{key: _from_json(part, reader) for key, part in parts.items()})
