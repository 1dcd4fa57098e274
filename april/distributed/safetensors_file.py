"""Single tensors out of a safetensors file, without mapping it into memory: a file that another machine removes stays readable
or fails as an error, and not as a signal.

    8 bytes: length of the header | header, JSON: name -> {dtype, shape, data_offsets} | the tensors' bytes
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from april.core.errors import DataError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_LARGEST_HEADER = 100_000_000


class TensorFile:
    """An open file; a context manager.

    Args:
        path: of the file.
        num_bytes: that it must have.
        hint: what to do when it is damaged.

    Raises:
        FileNotFoundError: there is none.
        DataError: it has another size, or no header that makes sense.
    """

    def __init__(self, path: Path, num_bytes: int, hint: str | None = None) -> None:
        self.path, self._hint = path, hint
        self._file = path.open("rb", buffering=0)
        try:
            size = os.fstat(self._file.fileno()).st_size
            if size != num_bytes:
                raise self.damaged("", f"{size} bytes", f"{num_bytes} bytes")
            self._header, self._start = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(self._file.read(8), "little")
        try:
            header = json.loads(self._file.read(min(length, _LARGEST_HEADER)))
            if not isinstance(header, dict):
                raise ValueError(f"a {type(header).__name__}")
        except ValueError as error:
            raise self.damaged("", f"a header that cannot be read ({error})", "a safetensors file") from error
        return header, 8 + length

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            DataError: it is not there, has another shape or type, or is cut off.
        """
        entry = self._header.get(name)
        wanted = {"dtype": _NAMES[dtype], "shape": list(shape)}
        found = entry if isinstance(entry, dict) else {}
        if {key: found.get(key) for key in wanted} != wanted:
            raise self.damaged(name, entry, str(wanted))
        tensor = torch.empty(shape, dtype=dtype)
        match found.get("data_offsets"):
            case [int(begin), int(end)] if 0 <= begin <= end:
                pass
            case other:
                raise self.damaged(name, f"data_offsets {other}", "two numbers")
        if end - begin != math.prod(shape) * tensor.element_size():
            raise self.damaged(name, f"{end - begin} bytes", f"{math.prod(shape) * tensor.element_size()} bytes")
        self._fill(name, tensor, self._start + begin)
        return tensor

    def _fill(self, name: str, tensor: Tensor, start: int) -> None:
        if tensor.numel() == 0:
            return
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(memory):
            self._file.seek(start + done)
            count = self._file.readinto(memory[done:])
            if not count:
                raise self.damaged(name, f"an end after {done} bytes", f"{len(memory)} bytes")
            done += count

    def damaged(self, name: str, got: object, expected: str) -> DataError:
        """The error for whatever is wrong with the file."""
        where = f"{self.path}: {name}" if name else str(self.path)
        return DataError("a file of weights is damaged", where=where, got=got, expected=expected, hint=self._hint)
