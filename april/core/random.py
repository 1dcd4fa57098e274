"""Addressed random numbers: a draw belongs to a place, not to a moment.

The uniform for response position t of a sample is a pure function of (seed, sample id, t). So a generation
that is cut anywhere, moved, or run beside other requests draws the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from april.core.ids import SampleId

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def stream_key(seed: int, *address: object) -> int:
    """A 64-bit key for the stream at this address (seed and any printable parts)."""
    text = "\x1f".join(str(part) for part in (seed, *address))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def sample_key(seed: int, sample: SampleId) -> int:
    """The key of a sample's token stream: (seed, epoch, prompt, group, member, branch)."""
    return stream_key(seed, sample.epoch, sample.prompt, sample.serial, sample.member, sample.branch)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The SplitMix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(keys: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1) with 53 random bits, one for each (key, position).

    Args:
        keys: uint64 (N,).
        positions: non-negative integers (N,) or a scalar.
    """
    key = np.atleast_1d(np.asarray(keys, np.uint64))
    position = np.atleast_1d(np.asarray(positions, np.uint64))
    with np.errstate(over="ignore"):
        bits = _mix(_mix(key) ^ _mix((position + np.uint64(1)) * _GAMMA))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """The order of a data set of `size` items in one epoch; the same for the same arguments everywhere."""
    return np.random.Generator(np.random.PCG64(stream_key(seed, "order", epoch))).permutation(size)
