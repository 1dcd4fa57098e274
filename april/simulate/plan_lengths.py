"""Lengths of responses as they are told on the command line."""

from __future__ import annotations

from pathlib import Path

from april import registry
from april.core.errors import DataError, choice
from april.simulate.recorded import read_lengths
from april.simulate.workload import Workload

FIELDS = {
    "mean": "mean_tokens",
    "sigma": "sigma",
    "max": "max_tokens",
    "rho": "rho",
    "loops": "loop_fraction",
    "prompt": "prompt_tokens",
}


def parse_lengths(text: str) -> Workload:
    """Lengths as `mean=8000,sigma=0.9,max=16384`, or a run's folder, its lengths.jsonl, or CSVs with GeneratedTokens.

    Raises:
        DataError: neither.
    """
    if "=" not in text:
        path = Path(text)
        if not path.exists():
            raise DataError(
                "lengths cannot be read",
                where="--lengths",
                got=text,
                expected=f"a run's folder, a CSV, a folder of CSVs, or {', '.join(FIELDS)} with numbers",
                hint="check the path, or describe them: --lengths mean=8000,sigma=0.9,max=16384",
            )
        recorded = read_lengths(str(path))
        longest = {"max_tokens": int(recorded.sorted_tokens[-1])}
        if prompts := [*recorded.sorted_contexts, *recorded.prompts.values()]:
            longest["prompt_tokens"] = int(max(prompts))
        return Workload(lengths="recorded", path=str(path), **longest)
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in FIELDS:
            raise DataError(
                "unknown part of the lengths", where="--lengths", got=part, **choice(name, FIELDS, "such as mean=8000,sigma=0.9")
            )
        try:
            values[FIELDS[name]] = float(value)
        except ValueError:
            raise DataError(
                "not a number",
                where=f"--lengths {name}",
                got=repr(value),
                expected="a number",
                hint="such as mean=8000,sigma=0.9,max=16384",
            ) from None
    whole = {key: int(value) if key in ("max_tokens", "prompt_tokens") else value for key, value in values.items()}
    return registry.validate(Workload, whole, "lengths")  # type: ignore[return-value]
