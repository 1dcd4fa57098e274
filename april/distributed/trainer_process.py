"""The process of a trainer: batches in, versions out. Its other end is `april.distributed.remote_trainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from april.core.clock import WallClock
from april.core.errors import ProcessError
from april.core.group import Batch
from april.core.ids import Version
from april.core.metric import Metrics
from april.distributed.channel import Channel, Closed
from april.distributed.transport import Moved, WeightTransport
from april.training.single import Trainer

MakeTrainer = Callable[[WallClock], tuple[Trainer, Any]]
"""Makes the trainer, and the tokenizer that is saved with its policy."""


class Hello(NamedTuple):
    """The trainer is loaded."""

    version: Version


class Done(NamedTuple):
    """An update is done and its weights are published."""

    time_s: float
    version: Version
    metrics: Metrics
    written: Moved


class Answer(NamedTuple):
    """A command other than an update is carried out; `version` is the trainer's."""

    number: int
    version: Version


class Retracing(NamedTuple):
    """One update of the past has been made again."""

    step: int


def serve_trainer(channel: Channel, make: MakeTrainer, origin_s: float, transport: WeightTransport) -> None:
    """The life of a trainer's process: commands in, answers out, until the parent closes the connection."""
    clock = WallClock(origin_s)
    trainer, tokenizer = make(clock)
    channel.send(Hello(trainer.version))
    while True:
        try:
            commands = channel.receive()
        except Closed:
            return
        for name, *arguments in commands:
            match name:
                case "update":
                    metrics = trainer.update(*arguments)
                    written = _share(trainer, transport)
                    channel.send(Done(clock.now(), trainer.version, metrics, written))
                case "retrace":
                    _retrace(trainer, channel, transport, *arguments)
                case _:
                    number, *rest = arguments
                    _obey(trainer, tokenizer, transport, name, *rest)
                    channel.send(Answer(number, trainer.version))
        channel.wait(None)


def _obey(trainer: Trainer, tokenizer: Any, transport: WeightTransport, name: str, *arguments: Any) -> None:
    match name:
        case "save":
            trainer.save(arguments[0], tokenizer)
        case "load":
            trainer.load(*arguments)
        case "share":
            _share(trainer, transport)


def _share(trainer: Trainer, transport: WeightTransport) -> Moved:
    """Publish the weights."""
    weights = trainer.weights()  # with several ranks only the first one gets them
    return transport.write(weights, trainer.version) if weights else Moved(0.0, 0)


def _retrace(
    trainer: Trainer,
    channel: Channel,
    transport: WeightTransport,
    folder: Path | None,
    batches: Sequence[Batch],
    version: Version,
) -> None:
    """Make the state of a lost trainer again: a checkpoint, and the updates done since, on the same batches.

    Raises:
        ProcessError: the updates since the checkpoint are not all there, or did not give the same weights.
    """
    if folder is not None:
        trainer.load(folder)
    for batch in batches:
        if batch.step == trainer.version:
            trainer.update(batch)
            channel.send(Retracing(batch.step))
    problem, held = None, transport.holds(version)
    weights = trainer.weights() if held else {}  # with several ranks only the first one gets them
    if trainer.version != version:
        problem = f"it came to version {trainer.version}, and version {version} was lost"
    elif weights and not transport.same(weights, version):
        problem = f"the updates since {folder.name if folder else 'the start'} gave other weights than before"
    if problem:
        raise ProcessError(
            "the state of a lost trainer cannot be made again exactly",
            where="limits.on_trainer_loss",
            got=problem,
            expected=f"version {version}, bit for bit",
            hint="`april train --resume FOLDER` goes on from the newest checkpoint and the journal",
        )
    if weights and not transport.outlives_writer:
        transport.write(weights, version)
