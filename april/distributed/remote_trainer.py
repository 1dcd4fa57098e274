"""A trainer in a process of its own, and what stands for it in the controlling process.

    RemoteTrainer  -- update, save, load, share -->  serve_trainer: trainer.update -> weights to the transport
                  <---- done (version, metrics), answer --

When that process dies or hangs, its state is made again: the newest checkpoint, then the updates done since, on the same
batches. The weights that come out must equal the ones that were published, bit for bit; only then is the interrupted
batch trained on once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from april.config.limits import LimitsConfig
from april.core.clock import WallClock
from april.core.errors import ProcessError
from april.core.event import Event, Updated, Wait
from april.core.group import Batch
from april.core.ids import Version
from april.core.metric import Metrics
from april.core.restarts import Restarts
from april.distributed.child import Child, Launch, deliver, with_end
from april.distributed.trainer_process import Answer, Done, Hello, MakeTrainer, Retracing, serve_trainer
from april.distributed.transport import PublishedWeights, WeightTransport

MAX_RETRACED = 200
"""Batches that are kept to make a lost trainer's state again; a run with rarer checkpoints is resumed instead."""
_RESUME = "`april train --resume FOLDER` goes on from the newest checkpoint and the journal"


class Processes(Protocol):
    """The process of a trainer, or all of them: what `Child` is, and a group of them."""

    channel: Any

    @property
    def pid(self) -> int:
        """The process that answers."""

    def kill(self, grace_s: float = 0.0) -> str:
        """End it; returns how it ended."""

    def close(self) -> None:
        """End it and drop the connection."""


class RemoteTrainer:
    """See `april.training.single.Trainer`; the process is started by the first use, or by `start`.

    Args:
        make: makes the trainer in the child, on a clock with the origin of ours; importable.
        clock: of the run.
        limits: deadlines and policies.
        transport: publishes every version.
        newest: the folder of the newest checkpoint, None before there is one.
        threads: CPU threads of the child.
        spawn: starts the process; a child of this one by default.

    Attributes:
        version: of the weights; batches consumed so far.
        on_turn: called now and then while a call waits for the process.
    """

    name = "trainer"

    def __init__(
        self,
        make: MakeTrainer,
        *,
        clock: WallClock,
        transport: WeightTransport,
        limits: LimitsConfig | None = None,
        newest: Callable[[], Path | None] = lambda: None,
        threads: int = 1,
        spawn: Callable[[Launch], Processes] | None = None,
    ) -> None:
        self.version = Version(0)
        self.on_turn: Callable[[], None] = lambda: None
        self._make, self._clock, self._transport, self._newest, self._threads = make, clock, transport, newest, threads
        self._limits, self._start_process = limits or LimitsConfig(), spawn
        self._child: Processes | None = None
        self._up, self._was_up, self._retracing = False, False, False
        self._restarts = Restarts(self.name, self._limits.restarts, self._limits.restart_pause_s, self._limits.restart_window_s)
        self._restart_s: float | None = None
        self._batch: Batch | None = None
        self._losses: list[str] = []
        self.all_losses: list[str] = []
        """Why processes of this trainer were lost, in order."""
        self._past: deque[Batch] = deque(maxlen=MAX_RETRACED)
        self._saved: Version = 0
        self._since_s = self._due_s = 0.0
        self._outbox: list[Event] = []
        self._call: tuple[str, tuple[Any, ...]] | None = None
        self._number, self._answered = 0, 0

    # -- the process --------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start the process where it does not run; returns before it is loaded."""
        if self._child is not None or self._restart_s is not None:
            return
        self._child, self._up = self._spawn(), False
        self._since_s = self._clock.now()
        self._due_s = self._since_s + self._limits.start_s
        if self._was_up and self._task != "load":  # what is loaded takes the place of whatever there was
            self._retracing = True
            self._child.channel.send(("retrace", self._newest(), list(self._past), self.version))

    def _spawn(self) -> Processes:
        arguments = (self._make, self._clock.origin_s, self._transport)
        return (self._start_process or Child)(Launch(self.name, serve_trainer, arguments, self._threads))

    def _send(self, name: str, *arguments: Any) -> None:
        self.start()
        if self._up:
            self._since_s = self._clock.now()
            self._due_s = self._since_s + self._limits.train_s
        if self._child is not None:
            self._child.channel.send((name, *arguments))

    def _lost(self, reason: str, grace_s: float = 0.0) -> None:
        """The process is of no more use: begin again where it was, or say that this cannot be done.

        Raises:
            ProcessError: it did not start, was lost twice on one task or too often, or the recipe wants no second try.
        """
        child, self._child = self._child, None
        if child is None:
            return
        pid, ended = child.pid, child.kill(grace_s)
        child.close()
        was_up, self._up = self._up, False
        told = f"the trainer process {pid} {with_end(reason, ended)}"
        self.all_losses.append(told)
        if not self._was_up and not getattr(child, "lost_node", False):
            hint = 'in a script, start the run below `if __name__ == "__main__":`; or set training.process = "main"'
            raise ProcessError("the trainer process did not start", got=told, expected="a process that loads", hint=hint)
        if not self._busy and self._transport.outlives_writer:
            return  # nobody waits for it: the next use begins again
        if was_up:  # one that does not come up counts among the restarts alone: the task is not to blame
            self._losses.append(told)
        if (self._busy and self._limits.on_trainer_loss == "fail") or len(self._losses) > 1:
            expected = "one loss at most on one task" if len(self._losses) > 1 else None
            raise ProcessError(
                "the trainer process was lost",
                where=f"{self._task}, limits.on_trainer_loss",
                got="; ".join(self._losses or [told]),
                expected=expected,
                hint=_RESUME,
            )
        self._since_s = self._clock.now()
        self._restart_s = self._due_s = self._restarts.next_s(self._since_s, told)

    def _start_again(self) -> None:
        """Without a task too: the version that was published may have gone with the process."""
        self._restart_s = None
        self.start()
        if self._batch is not None:
            self._send("update", self._batch)
        if self._call is not None:
            name, arguments = self._call
            self._send(name, self._number, *arguments)

    @property
    def _task(self) -> str:
        if self._batch is not None:
            return f"update {self._batch.step}"
        return "idle" if self._call is None else self._call[0]

    # -- the source ---------------------------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        """Train on this batch; `Updated` comes with a later poll.

        Raises:
            ProcessError: another batch is being trained on.
        """
        if self._batch is not None:
            raise ProcessError("a batch came while another is trained on", where=f"update {batch.step}", got=self._task)
        self._batch, self._losses = batch, []
        self._send("update", batch)

    def waitables(self) -> Sequence[Any]:
        """The connection to the process."""
        return () if self._child is None else (self._child.channel,)

    def ready_at(self) -> float | None:
        """Now when an update is done; else when patience ends; None when nothing is waited for."""
        if self._outbox:
            return self._clock.now()
        return self._due_s if self._busy or self._restart_s is not None else None

    @property
    def _busy(self) -> bool:
        return self._batch is not None or self._call is not None

    def poll(self) -> list[Event]:
        """A finished update, if there is one; also gives the process up when it is late, and starts it again when it is due."""
        self._receive()
        if self._restart_s is not None and self._clock.now() >= self._restart_s:
            self._start_again()
        if self._child is not None and self._busy and self._clock.now() >= self._due_s:
            late_s = self._clock.now() - self._since_s
            self._lost(f"was killed: {late_s:.1f} s for {self._task}" + ("" if self._up else ", and it is not loaded"))
        events, self._outbox = self._outbox, []
        return events

    def _receive(self) -> None:
        deliver(self._child, self._take, lambda reason, _failed: self._lost(reason, grace_s=1.0))

    def _take(self, message: Hello | Done | Answer | Retracing) -> None:
        self._since_s = self._clock.now()
        self._due_s = self._since_s + self._limits.train_s
        match message:
            case Hello():
                self._up = self._was_up = True
            case Done(time_s, version, metrics, written) if self._batch is not None:
                self._transport.took("write", written)
                self.version, self._retracing = version, False
                self._past.append(self._batch)
                self._batch = None
                self._outbox.append(Updated(time_s, version, metrics))
            case Answer(number, version):
                self._answered, self._retracing, self.version = number, False, version
            case _:
                pass

    def pending(self) -> list[str]:
        """The batch that is trained on."""
        return [wait.what[0] for wait in self.waits()]

    def waits(self) -> list[Wait]:
        """The update, and what it waits for itself."""
        if not self._busy:
            return []
        stage = "train" if self._up else "start"
        what = self._task + (" (its state is being made again)" if self._retracing else "")
        owner = f"{self.name} (no process)" if self.pid is None else f"{self.name} (process {self.pid})"
        return [Wait(owner, stage, (what,), self._since_s, self._due_s)]

    # -- calls that wait ----------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> Metrics:
        """Train on one batch and wait for it."""
        self.submit(batch)
        while True:
            self._wait_a_moment()
            for event in self._outbox:
                if isinstance(event, Updated):
                    self._outbox.remove(event)
                    return event.metrics

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Write a checkpoint into a folder, from the child; it brings its own tokenizer."""
        self._ask("save", folder)
        while self._past and self._past[0].step < self._saved:  # the one before: this one is not whole before it is renamed
            self._past.popleft()
        self._saved = self.version

    def load(self, folder: Path) -> None:
        """Continue exactly where `save` was called."""
        self._ask("load", folder)
        self._past.clear()
        self._saved = self.version

    def weights(self) -> PublishedWeights:
        """Hugging Face name -> tensor, as they are published; they last until the update after the next."""
        if not self._transport.holds(self.version):
            self._ask("share")
        return self._transport.view(self.version)

    def _ask(self, name: str, *arguments: Any) -> None:
        """One command, carried out before this returns."""
        self._number, self._losses = self._number + 1, []
        self._call = (name, arguments)
        self._send(name, self._number, *arguments)
        while self._answered != self._number:
            self._wait_a_moment()
        self._call = None

    def _wait_a_moment(self) -> None:
        self._clock.wait_until(min(self._due_s, self._clock.now() + 1.0), self.waitables())
        self._outbox = self.poll()
        self.on_turn()

    def close(self) -> None:
        """End the process; what is not saved is lost."""
        if self._child is not None:
            self._child.close()
        self._child, self._restart_s, self._batch, self._call, self._outbox = None, None, None, None, []
