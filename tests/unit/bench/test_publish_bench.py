"""The benchmark of transports: every case is measured, and what is moved is what it says."""

from __future__ import annotations

import pytest
import torch

from april.bench import publish_bench
from april.bench.publish_bench import PublishOptions, markdown, run_publish_bench, some_of, weights_like
from april.core.errors import DataError, ProcessError


def test_the_middle_tensors_by_size_change() -> None:
    weights = {f"t{size}": torch.zeros(size) for size in range(1, 201)}
    assert some_of(weights, 0.01) == ["t100", "t101"]
    assert some_of({"only": torch.zeros(3)}, 0.01) == ["only"]


def test_every_transport_is_measured_in_turn() -> None:
    lines: list[str] = []
    results = run_publish_bench(PublishOptions(models=("tiny",), rounds=2, readers=1), lines.append)
    (model,) = results["models"]
    weights = weights_like("tiny")
    assert model["num_parameters"] == sum(tensor.numel() for tensor in weights.values()) and model["num_tensors"] == len(weights)
    cases = model["cases"]
    assert set(cases) == {"shared_memory", "disk", "broadcast", f"disk, 1 of {len(weights)} tensors changed"}
    assert len(lines) == 4 and all(row["publish_s"] >= row["write_s"] > 0 < row["read_s"] for row in cases.values())
    few = cases[f"disk, 1 of {len(weights)} tensors changed"]
    assert few["bytes_written"] < 0.2 * cases["disk"]["bytes_written"] and few["bytes_read"] < 0.2 * cases["disk"]["bytes_read"]
    assert cases["shared_memory"]["bytes_read"] == model["bytes"] == cases["broadcast"]["bytes_written"]
    table = markdown(results)
    assert table.count("| tiny") == 4 and "shared_memory" in table


def test_unknown_names_and_readers_that_have_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="unknown transport") as caught:
        run_publish_bench(PublishOptions(transports=("disc",)))
    assert "disk" in str(caught.value.hint)
    monkeypatch.setattr(publish_bench, "_answer", lambda _reader: (0.0, 0, 12345.0))
    with pytest.raises(ProcessError, match="other weights than were published"):
        run_publish_bench(PublishOptions(models=("tiny",), transports=("shared_memory",), rounds=1, readers=1))
