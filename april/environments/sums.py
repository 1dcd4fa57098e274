"""Worked solutions of reasoning-gym's `chain_sum`, for the warm start of the packaged policy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_OPERATOR = re.compile(r" (?=[+-] )")


def worked_solution(item: Mapping[str, Any]) -> str:
    """Add the first two terms and copy the rest, line by line: `4 + 1 - 7` -> `\\n= 5 - 7\\n= -2`.

    The length grows with the square of the number of terms.
    """
    head, *rest = _OPERATOR.split(item["metadata"]["expression"])
    total, lines = int(head), []
    while rest:
        operator, term = rest.pop(0).split(" ")
        total += int(term) if operator == "+" else -int(term)
        lines.append("\n= " + " ".join([str(total), *rest]))
    return "".join(lines)
