"""Lengths that real runs and services had.

lengths.jsonl of a run, one line a trained group:
    {"step": 3, "epoch": 0, "prompt": "p17", "prompt_tokens": 41, "tokens": [80, 512], "stops": ["eos", "length"]}
or a CSV with columns ContextTokens and GeneratedTokens (the Azure LLM inference traces), or a folder of such files. ContextTokens
may be missing.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from april.core.errors import DataError
from april.observe.sinks import read_lines

FILE = "lengths.jsonl"


@dataclass(slots=True)
class Recorded:
    """Lengths by sample, where the recording says which, and all of them in order of size.

    Attributes:
        sorted_tokens: int64 (n,), ascending.
        prompts: name -> prompt tokens, in order of first appearance; empty when the recording has no names.
        by_sample: (epoch, prompt) -> lengths by member.
        sorted_contexts: int64 (n,), ascending: prompt tokens of requests without names; empty when they were not recorded.
    """

    sorted_tokens: npt.NDArray[np.int64]
    prompts: dict[str, int] = field(default_factory=dict)
    by_sample: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    sorted_contexts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def of(self, epoch: int, prompt: str, member: int) -> int | None:
        """The recorded length of a sample; None when it was not recorded."""
        known = self.by_sample.get((epoch, prompt), ())
        return known[member] if member < len(known) else None


def read_lengths(path: str, folder: Path | None = None) -> Recorded:
    """Read a run's folder, its lengths.jsonl, a CSV, or a folder of CSVs.

    Args:
        folder: where a relative path starts that does not exist as it is.

    Raises:
        DataError: no such file, or no lengths in it.
    """
    file = Path(path)
    if not file.exists() and folder is not None:
        file = folder / path
    files = recording_files(file)
    if not files:
        raise DataError(
            "recorded lengths are missing",
            where="workload.path",
            got=path,
            expected=f"a run's folder, {FILE}, a CSV or a folder of CSVs",
        )
    recorded = _read_csvs(files) if files[0].suffix == ".csv" else _read_run(files[0])
    if not len(recorded.sorted_tokens):
        raise DataError(
            "a recording has no lengths", where=str(file), got="no usable line", expected="lengths of at least one sample"
        )
    return recorded


def recording_files(path: Path) -> list[Path]:
    """The files of a recording; none when there is no recording."""
    if path.is_dir():
        run = path / FILE
        return [run] if run.is_file() else sorted(path.glob("*.csv"))
    return [path] if path.is_file() else []


def _read_run(file: Path) -> Recorded:
    prompts: dict[str, int] = {}
    by_sample: dict[tuple[int, str], tuple[int, ...]] = {}
    lines = [line for line in read_lines(file) if "tokens" in line and "prompt" in line]
    for line in sorted(lines, key=lambda line: int(line.get("serial", 0))):
        prompt = str(line["prompt"])
        prompts.setdefault(prompt, max(1, int(line.get("prompt_tokens", 1))))
        by_sample[int(line.get("epoch", 0)), prompt] = tuple(max(1, int(tokens)) for tokens in line["tokens"])
    everything = [tokens for group in by_sample.values() for tokens in group]
    return Recorded(np.sort(np.asarray(everything, np.int64)), prompts, by_sample)


def _read_csvs(files: list[Path]) -> Recorded:
    lengths: list[int] = []
    contexts: list[int] = []
    for file in files:
        with open(file, encoding="utf-8", newline="") as source:
            rows = csv.DictReader(source)
            names = rows.fieldnames or ()
            if "GeneratedTokens" not in names:
                raise DataError("a CSV has no column GeneratedTokens", where=str(file), got=names)
            for row in rows:
                lengths.append(max(1, int(row["GeneratedTokens"])))
                if "ContextTokens" in names:
                    contexts.append(max(1, int(row["ContextTokens"])))
    return Recorded(np.sort(np.asarray(lengths, np.int64)), sorted_contexts=np.sort(np.asarray(contexts, np.int64)))
