"""What a reader of Ray's object store is told, with a board that only answers."""

from __future__ import annotations

from typing import Any

import pytest
from publishing_helpers import weights_of

pytest.importorskip("ray", reason="the extra april-rl[ray] is not installed")

from april.core.errors import ProcessError
from april.distributed import ray_weights
from april.distributed.layout import Layout
from april.distributed.ray_weights import RayWeights
from april.distributed.transport import NotYet


def test_a_version_that_was_passed_is_asked_for_no_more_and_one_that_never_was_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(_name: str, method: str, *_arguments: Any, timeout_s: float) -> list[Any]:
        return [2, 3] if method == "versions" else []

    monkeypatch.setattr(ray_weights, "ask_board", ask)
    transport = RayWeights(Layout.of(weights_of(0)), "board")
    with pytest.raises(NotYet, match="not in the object store"), transport.reading(1):
        pytest.fail("version 1 was passed")
    with pytest.raises(ProcessError, match="not in the object store") as caught, transport.reading(4):
        pytest.fail("version 4 is not written yet")
    assert not isinstance(caught.value, NotYet)
