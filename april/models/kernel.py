"""The compiled parts of a decode step on a CPU: built once for each model shape, kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

from april.core.errors import ModelError

LANES = 16
"""Numbers that the kernel takes at a time; sizes are multiples of it."""
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_SOURCE = "decode_attention.cpp"
_COMPILE_S = 120.0


class Step(ctypes.Structure):
    """What all layers of one decode step have in common; `Step` of the source."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("layer_stride", ctypes.c_void_p),
        ("value_stride", ctypes.c_void_p),
        ("head_stride", ctypes.c_void_p),
        ("length", ctypes.c_void_p),
        ("phases", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class Kernel:
    """The functions of a built library; arguments as the source says.

    Args:
        library: of the model's shape.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        address, count = ctypes.c_void_p, ctypes.c_int64
        self.decode_attention = library.april_decode_attention
        self.decode_attention.argtypes = (ctypes.POINTER(Step), count, address, address, address)
        self.gated = library.april_gated
        self.gated.argtypes = (address, count, count, count, address)
        self.rms_normed = library.april_rms_normed
        self.rms_normed.argtypes = (address, count, count, ctypes.c_float, count, address)
        for function in (self.decode_attention, self.gated, self.rms_normed):
            function.restype = None


@cache
def kernel(head_dim: int, group: int) -> Kernel:
    """The kernel of this shape, compiled where the cache folder does not have it.

    Args:
        head_dim: of queries, keys and values; a multiple of 16.
        group: queries that share a head of keys and values.

    Raises:
        ModelError: there is no compiler, or it fails; says why.
    """
    compiler = shlex.split(os.environ.get("CXX") or "") or [shutil.which("g++") or ""]
    if not compiler[0]:
        raise ModelError("no C++ compiler", where="g++", hint="install g++, or name one by CXX")
    source = resources.files("april.models").joinpath(_SOURCE).read_bytes()
    flags = [*_FLAGS, f"-DHEAD_DIM={head_dim}", f"-DGROUP={group}"]
    key = hashlib.sha256(source + "\n".join([*flags, _output([*compiler, "--version"]), _processor()]).encode()).hexdigest()
    path = cache_folder() / f"decode-{head_dim}-{group}-{key[:16]}.so"
    _build([*compiler, *flags], source, path)
    try:
        return Kernel(ctypes.CDLL(str(path)))
    except OSError as error:
        hint = "remove the file, or set XDG_CACHE_HOME"
        raise ModelError("a compiled kernel does not load", where=str(path), got=str(error), hint=hint) from error


def cache_folder() -> Path:
    """Where built kernels are kept: `april` in `XDG_CACHE_HOME`, by default in `~/.cache`.

    Raises:
        ModelError: this user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "april"
    except RuntimeError as error:
        raise ModelError("a kernel cannot be kept", got=str(error), hint="set XDG_CACHE_HOME") from error


def _build(command: list[str], source: bytes, path: Path) -> None:
    """Unless it is there, compile beside the place and move there: processes that start together do not see half a file."""
    try:
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            text, built = Path(folder) / _SOURCE, Path(folder) / path.name
            text.write_bytes(source)
            _output([*command, str(text), "-o", str(built)])
            built.replace(path)
    except OSError as error:
        raise ModelError("a kernel cannot be kept", where=str(path.parent), got=str(error), hint="set XDG_CACHE_HOME") from error


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError("the C++ compiler does not run", where=command[0], got=str(error)) from error
    if done.returncode:
        raise ModelError("the C++ compiler fails", where=command[0], got=done.stderr.strip()[-500:])
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("flags", "Features", "CPU part")  # the first on x86, the others on Arm
    return "\n".join(sorted({line for line in lines if line.startswith(told)})) + platform.machine()
