"""Where the tensors of one set of weights lie in a flat piece of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from april.core.errors import ProcessError

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies: byte offset, shape and type."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor alone."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of one set of weights lie.

    Attributes:
        places: by name.
        num_bytes: of all of them, with what lies between.
    """

    places: Mapping[str, TensorPlace]
    num_bytes: int

    @staticmethod
    def of(weights: Mapping[str, Tensor]) -> Layout:
        """The layout of tensors of these shapes and types."""
        places, at = {}, 0
        for name, tensor in weights.items():
            places[name] = TensorPlace(at, tuple(tensor.shape), tensor.dtype)
            at += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        return Layout(places, max(at, _ALIGNMENT))

    def check(self, names: Iterable[str]) -> None:
        """Compare names with those of the layout.

        Raises:
            ProcessError: they are others.
        """
        found = set(names)
        if found != self.places.keys():
            raise ProcessError(
                "weights do not fit what they are published through",
                where="weights",
                got=f"{len(found)} tensors, first other name {min(found ^ self.places.keys())}",
                expected=f"the {len(self.places)} tensors of the policy",
            )

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors in flat memory, uint8 (num_bytes,); nothing is copied."""
        return {
            name: flat[place.offset : place.offset + place.num_bytes].view(place.dtype).reshape(place.shape)
            for name, place in self.places.items()
        }

    @torch.no_grad()
    def copy(self, weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Copy all tensors into others of this layout.

        Raises:
            ProcessError: their names are others; then nothing is copied.
        """
        self.check(weights)
        for name, tensor in weights.items():
            into[name].copy_(tensor)
