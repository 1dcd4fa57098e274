"""A program, judged by running it on the tests of its item (for ACECode, Afterburner and the like)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.rewards.base import Verifier
from april.rewards.program_run import run_tests

BLOCK = "block"
FENCED = re.compile(r"(?s)```([^\n`]*)\n(.*?)```")
PYTHON = ("python", "python3", "py")
NO_PROGRAM = Reward(0.0, False, {"answered": 0.0, "compiled": 0.0, "ran": 0.0, "passed": 0.0})


class ProgramReward(Config):
    """Runs the response's Python program on the item's tests: 1 when all of them hold, else 0."""

    type: Literal["program"] = "program"
    code_pattern: str | None = Field(
        BLOCK,
        description='Regular expression that finds the program in a response (last match); "block": the last fenced block of '
        "Python, or of no language where there is none.",
    )
    timeout_s: float = Field(
        4.0, gt=0, description="Of all tests together; a program that takes longer has stopped. Below scoring.timeout_s."
    )
    memory_bytes: int = Field(
        1 << 30, ge=50_000_000, description="Address space of the program, the interpreter's part included."
    )
    repeats: int = Field(1, ge=1, description="Runs of each test; time_s is the sum of their medians.")
    partial_credit: bool = Field(False, description="Whether the reward is the share of tests that hold.")

    @field_validator("code_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str | None) -> str | None:
        return checked_pattern(value)

    def build(self) -> Verifier:
        """The verifier."""
        return Program(self.code_pattern, self.timeout_s, self.memory_bytes, self.repeats, self.partial_credit)


@dataclass(frozen=True, slots=True)
class Program:
    """Judges a program. The item holds "tests": a list of Python texts with assertions, or of {"input", "output"}.

    Parts: answered, compiled and ran (0 or 1), passed (share of tests), and for a program that passes all of them time_s.
    See `program_run` for the limits that it runs under, and for what they are not.
    """

    code_pattern: str | None = BLOCK
    timeout_s: float = 4.0
    memory_bytes: int = 1 << 30
    repeats: int = 1
    partial_credit: bool = False

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        source = last_block(text) if self.code_pattern == BLOCK else last_match(text, self.code_pattern)
        if source is None:
            return NO_PROGRAM
        run = run_tests(
            source, item.get("tests", ()), timeout_s=self.timeout_s, memory_bytes=self.memory_bytes, repeats=self.repeats
        )
        correct = run.passed == 1
        parts = {"answered": 1.0, "compiled": float(run.compiled), "ran": float(run.ran), "passed": run.passed}
        if correct:
            parts["time_s"] = run.time_s
        return Reward(run.passed if self.partial_credit else float(correct), correct, parts)


def last_block(text: str) -> str | None:
    """The last fenced block of Python, else the last one of no language; None without either."""
    blocks = [(match[1].strip().lower(), match[2].strip()) for match in FENCED.finditer(text)]
    for tags in (PYTHON, ("",)):
        found = [body for tag, body in blocks if tag in tags]
        if found:
            return found[-1]
    return None
