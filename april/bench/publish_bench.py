"""What publishing costs: one writer, engines in processes of their own, the transports in turn.

    write (here) -> command -> every reader: reading, copied into tensors of its own -> answer

All transports exist at once and take turns within a round, in another order each time. Weights have the shapes of a model of
the benchmarks; all of them change between two rounds, but for the case in which only some tensors do.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from april.bench.shapes import shape_named
from april.core.clock import WallClock
from april.core.errors import DataError, ProcessError, nearest
from april.distributed.broadcast_weights import BroadcastWeights
from april.distributed.channel import Channel, Closed
from april.distributed.child import Child, Launch
from april.distributed.disk_weights import DiskWeights
from april.distributed.layout import Layout
from april.distributed.shared_weights import WeightBuffer
from april.distributed.transport import WeightTransport

TRANSPORTS = ("shared_memory", "disk", "broadcast")
_ANSWER_S = 300.0


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """What is measured.

    Attributes:
        models: names of benchmark shapes.
        transports: names as in a recipe.
        readers: engines that take every version.
        rounds: counted; one more goes before.
        changed_fraction: of the tensors, in the case of the disk where not all change.
        folder: of the disk transport; a temporary one when left out.
        fsync: force files to the disk.
        bucket_mib: of files and broadcasts.
        threads: CPU threads of torch in each process.
    """

    models: tuple[str, ...] = ("1m", "25m", "100m")
    transports: tuple[str, ...] = TRANSPORTS
    readers: int = 2
    rounds: int = 5
    changed_fraction: float = 0.01
    folder: str | None = None
    fsync: bool = False
    bucket_mib: int = 64
    threads: int = 1


@dataclass(slots=True)
class _Case:
    """One transport under one kind of change."""

    label: str
    transport: str
    changed: Sequence[str]


def run_publish_bench(options: PublishOptions, say: Callable[[str], None] = lambda _line: None) -> dict[str, Any]:
    """Measure every model; medians over the rounds.

    Raises:
        DataError: a model or a transport is unknown.
        ProcessError: a reader does not answer.
    """
    for name in options.transports:
        if name not in TRANSPORTS:
            raise DataError("an unknown transport", where="--transport", got=name, hint=nearest(name, TRANSPORTS))
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        results = [_measured(model, options, say) for model in options.models]
    finally:
        torch.set_num_threads(threads)
    machine = {"system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    return {"settings": asdict(options), "machine": machine, "models": results}


def weights_like(model: str) -> dict[str, Tensor]:
    """Float32 tensors with the names and shapes of a model, all different."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    with torch.device("meta"):
        module: Any = AutoModelForCausalLM.from_config(Qwen3Config(**shape_named(model).hf_config()))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(parameter.shape, generator=generator) for name, parameter in module.named_parameters()}


def some_of(weights: Mapping[str, Tensor], fraction: float) -> list[str]:
    """This fraction of the tensors, one at least: the middle ones by size."""
    names = sorted(weights, key=lambda name: (weights[name].numel(), name))
    count = max(1, round(fraction * len(names)))
    start = (len(names) - count) // 2
    return names[start : start + count]


def _measured(model: str, options: PublishOptions, say: Callable[[str], None]) -> dict[str, Any]:
    weights = weights_like(model)
    layout = Layout.of(weights)
    with tempfile.TemporaryDirectory(prefix="april-publish-", dir=options.folder) as folder:
        transports = {name: _transport(name, layout, Path(folder), options) for name in options.transports}
        every = list(weights)
        cases = [_Case(name, name, every) for name in options.transports]
        if "disk" in transports:
            some = some_of(weights, options.changed_fraction)
            cases.append(_Case(f"disk, {len(some)} of {len(every)} tensors changed", "disk", some))
        readers = [_start_reader(index, transports, options) for index in range(options.readers)]
        try:
            rows = _rounds(weights, transports, readers, cases, options.rounds)
        finally:
            for reader in readers:
                reader.close()
            for transport in transports.values():
                transport.close()
    medians = {label: {key: statistics.median(row[key] for row in found) for key in found[0]} for label, found in rows.items()}
    for label, row in medians.items():
        say(f"{model}: {label}: " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    num = sum(tensor.numel() for tensor in weights.values())
    return {"model": model, "num_parameters": num, "num_tensors": len(weights), "bytes": layout.num_bytes, "cases": medians}


def _transport(name: str, layout: Layout, folder: Path, options: PublishOptions) -> WeightTransport:
    if name == "disk":
        return DiskWeights(folder / "weights", layout, file_bytes=options.bucket_mib << 20, fsync=options.fsync)
    if name == "broadcast":
        return BroadcastWeights(layout, bucket_bytes=options.bucket_mib << 20)
    return WeightBuffer(layout)


def _start_reader(index: int, transports: Mapping[str, WeightTransport], options: PublishOptions) -> Child:
    own = {name: transport.reader(f"reader {index}") for name, transport in transports.items()}
    return Child(Launch(f"reader {index}", serve_reader, (own, options.threads), options.threads))


def serve_reader(channel: Channel, transports: Mapping[str, WeightTransport], threads: int) -> None:
    """The life of a reader: takes each version that it is told of into tensors of its own, and says how long that took."""
    torch.set_num_threads(threads)
    own: dict[str, Tensor] = {}
    while True:
        channel.wait(None)
        try:
            commands = channel.receive()
        except Closed:
            return
        for name, version in commands:
            start_s = time.perf_counter()
            with transports[name].reading(version) as weights, torch.no_grad():
                for key, tensor in weights.items():
                    own.setdefault(key, torch.empty_like(tensor)).copy_(tensor)
            channel.send((time.perf_counter() - start_s, weights.num_bytes, float(own[min(own)].flatten()[0])))


def _rounds(
    weights: Mapping[str, Tensor],
    transports: Mapping[str, WeightTransport],
    readers: Sequence[Child],
    cases: Sequence[_Case],
    rounds: int,
) -> dict[str, list[dict[str, float]]]:
    """Numbers of each counted round, by case."""
    rows: dict[str, list[dict[str, float]]] = {case.label: [] for case in cases}
    versions = dict.fromkeys(transports, 0)
    for number in range(rounds + 1):
        turn = number % len(cases)
        for case in [*cases[turn:], *cases[:turn]]:
            for name in case.changed:
                weights[name].add_(0.5)
            if case.transport == "disk" and len(case.changed) < len(weights):
                _publish(transports["disk"], versions, readers, weights)  # what other turns have changed is no part of this one
                for name in case.changed:
                    weights[name].add_(0.5)
            row = _publish(transports[case.transport], versions, readers, weights)
            if number:
                rows[case.label].append(row)
    return rows


def _publish(
    transport: WeightTransport, versions: dict[str, int], readers: Sequence[Child], weights: Mapping[str, Tensor]
) -> dict[str, float]:
    version = versions[transport.name] = versions[transport.name] + 1
    start_s = time.perf_counter()
    written = transport.write(weights, version)
    for reader in readers:
        reader.channel.send((transport.name, version))
    answers = [_answer(reader) for reader in readers]
    total_s = time.perf_counter() - start_s
    expected = float(weights[min(weights)].flatten()[0])
    if any(value != expected for _, _, value in answers):
        raise ProcessError("a reader has other weights than were published", where=transport.name, got=answers)
    return {
        "publish_s": total_s,
        "write_s": written.seconds,
        "read_s": max(seconds for seconds, _, _ in answers),
        "bytes_written": written.num_bytes,
        "bytes_read": max(num_bytes for _, num_bytes, _ in answers),
    }


def _answer(reader: Child) -> tuple[float, int, float]:
    clock = WallClock()
    while clock.now() < _ANSWER_S:
        reader.channel.wait(_ANSWER_S - clock.now())
        try:
            for answer in reader.channel.receive():
                if not isinstance(answer, tuple):
                    raise ProcessError("a reader failed", where=reader.name, got=answer)
                return answer
        except Closed as closed:
            raise ProcessError("a reader is gone", where=reader.name, got=str(closed)) from closed
    raise ProcessError("a reader does not answer", where=reader.name, got=f"nothing for {_ANSWER_S:g} s")


def markdown(results: Mapping[str, Any]) -> str:
    """A table of the medians."""
    lines = ["| model | transport | all have it after, s | write, s | read, s | written, MB | read by each, MB |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for model in results["models"]:
        for label, row in model["cases"].items():
            seconds = " | ".join(f"{row[key]:.4f}" for key in ("publish_s", "write_s", "read_s"))
            sizes = " | ".join(f"{row[key] / 1e6:.2f}" for key in ("bytes_written", "bytes_read"))
            lines.append(f"| {model['model']} ({model['num_parameters'] / 1e6:.1f} M) | {label} | {seconds} | {sizes} |")
    return "\n".join(lines) + "\n"
