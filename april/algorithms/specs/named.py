"""Atoms whose options name columns that the data bring. No torch."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from april.algorithms.atoms import Atom

PATTERN = r"^(part|item)\.\S+$"


class NamesColumns(Atom):
    """Base of atoms with options that name a part of the reward ("part.cost") or a number of the item ("item.budget").

    Attributes:
        column_options: the fields that do.
    """

    column_options: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> frozenset[str]:
        """Its own columns and those that the options name."""
        return self.requires | {column for name in self.column_options if (column := getattr(self, name)) is not None}


def column(default: str, description: str) -> Any:
    """The field of an option that names a column."""
    return Field(default=default, pattern=PATTERN, description=description)


def optional_column(description: str) -> Any:
    """The field of an option that may name a column."""
    return Field(default=None, pattern=PATTERN, description=description)
