"""What the tests of the documentation share: the pages and what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(.*)\n([\s\S]*?)^```$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def blocks(text: str, language: str) -> Iterator[tuple[str, str]]:
    """(mark, body) of each fenced block of a language; the mark is the rest of its first line."""
    for match in FENCE.finditer(text):
        first, _, mark = match[1].partition(" ")
        if first == language:
            yield mark, match[2]


def section(text: str, heading: str) -> str:
    return re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
