"""What a compared engine has to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

TokenLists = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Setup:
    """How an engine is opened.

    Attributes:
        folder: of the model, as Hugging Face saves it.
        threads: CPU threads.
        max_rows: most requests of a workload.
        max_tokens: longest prompt plus response.
        kv_gib: whole GiB that hold the KV of any workload, for engines that allocate it beforehand.
        engine: options of April's engine that are not its defaults.
    """

    folder: str
    threads: int
    max_rows: int
    max_tokens: int
    kv_gib: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generated:
    """What came of a workload.

    Attributes:
        wall_s: seconds from the first request given to the last response received; opening the engine is not counted.
        num_tokens: new tokens of each request.
        num_steps: decode steps, counted or (for engines that do not tell) the length of the longest request.
        num_prefills: batches that were started, which is how many of these steps also read prompts.
    """

    wall_s: float
    num_tokens: list[int]
    num_steps: int
    num_prefills: int = 1


class Peer(Protocol):
    """An engine that samples at temperature 1 from the whole vocabulary, in float32.

    Its constructor takes a `Setup`; an `ImportError` from it means that the engine is not installed.
    """

    version: str

    def generate(self, prompts: TokenLists, max_new_tokens: Sequence[int], batch_rows: int) -> Generated:
        """Generate exactly so many new tokens for each prompt.

        Args:
            batch_rows: requests of one batch, for engines that run whole batches; others decode all requests together.
        """
        ...

    def close(self) -> None:
        """Let everything go."""
        ...
