"""A trainer in another process: updates beside rollouts; lost or late, its state comes back bit for bit or not at all."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_helpers import LIMITS, Die, Stepped, ThreadChild
from rollout_helpers import FakeRewards, make_prompts

from april.core.clock import WallClock
from april.core.errors import ModelError, ProcessError
from april.core.event import Event, Updated
from april.core.group import Batch
from april.core.metric import Metrics, Sum
from april.core.sampling import SamplingSpec
from april.distributed import remote_trainer
from april.distributed.layout import Layout
from april.distributed.remote_trainer import RemoteTrainer
from april.distributed.shared_weights import WeightBuffer
from april.rollout.driver import Driver
from april.rollout.schedules.bounded_async import BoundedAsyncConfig, BoundedAsyncSchedule
from april.rollout.schedules.sync import SyncConfig, SyncSchedule
from april.selection.sampler import PromptSampler


class Tiny:
    """One number for weights; the n-th update of all processes together may die, wait or raise."""

    def __init__(self, before_update: Callable[[int], None] = lambda _count: None, drift: float = 0.0) -> None:
        self.version, self.weight = 0, torch.ones(3)
        self.before_update, self.drift = before_update, drift

    def update(self, batch: Batch) -> Metrics:
        self.before_update(batch.step)
        self.weight = self.weight * 1.1 + batch.step + self.drift
        self.version += 1
        return {"updates": Sum(1)}

    def weights(self) -> dict[str, torch.Tensor]:
        return {"w": self.weight}

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        torch.save((self.version, self.weight), folder / "tiny.pt")

    def load(self, folder: Path) -> None:
        self.version, self.weight = torch.load(folder / "tiny.pt")


@pytest.fixture(autouse=True)
def _in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_trainer, "Child", ThreadChild)


def make(trainer: Callable[[], Tiny], newest: Callable[[], Path | None] = lambda: None, **limits: Any) -> RemoteTrainer:
    buffer = WeightBuffer(Layout.of({"w": torch.ones(3)}))
    changed = LIMITS.model_copy(update=limits)
    return RemoteTrainer(lambda _clock: (trainer(), None), clock=WallClock(), transport=buffer, limits=changed, newest=newest)  # type: ignore[arg-type,return-value]


def batch(step: int) -> Batch:
    return Batch(step, step, ())


def plain(steps: int) -> torch.Tensor:
    tiny = Tiny()
    for step in range(steps):
        tiny.update(batch(step))
    return tiny.weight


def dies_at(*moments: int) -> Callable[[int], None]:
    """The updates with these numbers, counted over all processes, end their process."""
    counter = itertools.count()

    def before(_step: int) -> None:
        if next(counter) in moments:
            raise Die

    return before


def test_updates_give_versions_in_shared_memory() -> None:
    trainer = make(Tiny)
    assert trainer.ready_at() is None
    assert trainer.update(batch(0)) == {"updates": Sum(1)}
    trainer.submit(batch(1))
    (wait,) = trainer.waits()
    assert (wait.stage, wait.what, wait.owner) == ("train", ("update 1",), "trainer (process 0)")
    assert trainer.ready_at() == wait.deadline_s and trainer.pending() == ["update 1"]
    with pytest.raises(ProcessError, match="while another is trained on"):
        trainer.submit(batch(2))
    events: list[Event] = []
    while not events:
        WallClock().wait_until(1.0, trainer.waitables())
        events = trainer.poll()
    assert [type(event) for event in events] == [Updated] and trainer.version == 2
    assert torch.equal(trainer.weights()["w"], plain(2))
    trainer.close()


def test_weights_before_the_first_update_are_shared_on_request() -> None:
    trainer = make(Tiny)
    assert torch.equal(trainer.weights()["w"], torch.ones(3)) and trainer.version == 0
    trainer.close()


def test_whoever_waits_for_a_save_hears_of_it(tmp_path: Path) -> None:
    trainer, turns = make(Tiny), list[str]()
    trainer.on_turn = lambda: turns.append(trainer.pending()[0])
    trainer.save(tmp_path)
    assert set(turns) == {"save"}
    trainer.close()


@pytest.mark.parametrize("moment", [0, 2, 4])
def test_a_lost_update_is_done_once_more_on_the_same_state(tmp_path: Path, moment: int) -> None:
    """With a checkpoint after two updates; the process dies in one before it, in the next, or later."""
    before, saved = dies_at(moment), []
    trainer = make(lambda: Tiny(before), lambda: tmp_path if saved else None)
    for step in range(4):
        trainer.update(batch(step))
        if step == 1:
            trainer.save(tmp_path)
            saved.append(True)
    assert trainer.version == 4 and torch.equal(trainer.weights()["w"], plain(4))
    trainer.close()


def test_two_losses_on_one_batch_end_the_run_with_both_reasons() -> None:
    before = dies_at(1, 3)  # update 1; and, after update 0 was made again, update 1 once more
    trainer = make(lambda: Tiny(before))
    trainer.update(batch(0))
    with pytest.raises(ProcessError, match="the trainer process was lost") as caught:
        trainer.update(batch(1))
    assert str(caught.value.got).count("closed the connection") == 2 and "--resume" in str(caught.value.hint)


def not_up_at(*starts: int) -> Callable[[], Tiny]:
    """The processes with these numbers die before they are loaded; the first dies in update 1."""
    counter, before = itertools.count(), dies_at(1)

    def load() -> Tiny:
        if next(counter) in starts:
            raise Die
        return Tiny(before)

    return load


def test_a_process_that_does_not_come_up_again_is_a_restart_and_no_loss_of_its_task() -> None:
    trainer = make(not_up_at(1, 2))
    trainer.update(batch(0))
    trainer.update(batch(1))
    assert torch.equal(trainer.weights()["w"], plain(2)) and len(trainer.all_losses) == 3
    trainer.close()

    trainer = make(not_up_at(1, 2), restarts=2)
    trainer.update(batch(0))
    with pytest.raises(ProcessError, match="the trainer process was lost 3 times") as caught:
        trainer.update(batch(1))
    assert caught.value.where == "limits.restarts"


def test_a_lost_process_is_started_again_after_a_pause_that_doubles() -> None:
    trainer = make(not_up_at(), restart_pause_s=1000.0)
    trainer.update(batch(0))
    trainer.submit(batch(1))
    WallClock().wait_until(60.0, trainer.waitables())
    assert trainer.poll() == [] and trainer.pid is None
    (wait,) = trainer.waits()
    assert (wait.owner, wait.stage, wait.what) == ("trainer (no process)", "start", ("update 1",))
    assert trainer.ready_at() == wait.deadline_s == wait.since_s + 1000.0
    trainer.close()


def test_with_fail_the_first_loss_ends_the_run() -> None:
    before = dies_at(1)
    trainer = make(lambda: Tiny(before), on_trainer_loss="fail")
    trainer.update(batch(0))
    with pytest.raises(ProcessError, match="the trainer process was lost"):
        trainer.update(batch(1))


def test_a_state_that_cannot_be_made_again_bit_for_bit_is_refused() -> None:
    before, drift = dies_at(1), itertools.count()
    trainer = make(lambda: Tiny(before, drift=1e-3 * next(drift)))  # another process computes a little differently
    trainer.update(batch(0))
    with pytest.raises(ProcessError, match="cannot be made again exactly") as caught:
        trainer.update(batch(1))
    assert "gave other weights than before" in str(caught.value.got)


def test_updates_that_are_no_longer_known_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_trainer, "MAX_RETRACED", 2)
    before = dies_at(3)
    trainer = make(lambda: Tiny(before))
    for step in range(3):
        trainer.update(batch(step))
    with pytest.raises(ProcessError, match="cannot be made again exactly") as caught:
        trainer.update(batch(3))
    assert "it came to version 0, and version 3 was lost" in str(caught.value.got)


def test_a_process_that_dies_between_updates_is_replaced_by_the_next_use(tmp_path: Path) -> None:
    trainer = make(Tiny)
    trainer.update(batch(0))
    child = trainer._child
    assert isinstance(child, ThreadChild)
    child.kill()
    WallClock().wait_until(5.0, trainer.waitables())
    assert trainer.poll() == [] and trainer.pid is None and trainer.ready_at() is None
    trainer.update(batch(1))
    assert torch.equal(trainer.weights()["w"], plain(2))
    trainer.close()


class Forgetful(WeightBuffer):
    """Stands for a transport whose versions go with the process that wrote them."""

    outlives_writer = False

    def __init__(self) -> None:
        super().__init__(Layout.of({"w": torch.ones(3)}))
        self.written: list[int] = []

    def write(self, weights: Any, version: int) -> Any:
        self.written.append(version)
        return super().write(weights, version)


@pytest.mark.parametrize("forgetful", [True, False])
def test_a_version_that_went_with_its_writer_is_made_again_at_once(forgetful: bool) -> None:
    transport = Forgetful()
    transport.outlives_writer = not forgetful
    trainer = RemoteTrainer(lambda _clock: (Tiny(), None), clock=WallClock(), transport=transport, limits=LIMITS)  # type: ignore[arg-type,return-value]
    trainer.update(batch(0))
    child = trainer._child
    assert isinstance(child, ThreadChild)
    child.kill()
    WallClock().wait_until(5.0, trainer.waitables())
    assert trainer.poll() == [] and (trainer.waitables() != ()) == forgetful
    if forgetful:
        trainer._ask("share")  # the answer says that the process has made its state again
    assert transport.written == ([1, 1, 1] if forgetful else [1])
    trainer.close()


def test_an_update_that_hangs_is_killed_at_its_deadline() -> None:
    gate = threading.Event()

    def hang(step: int) -> None:
        if step == 1:
            gate.wait(30)

    trainer = make(lambda: Tiny(hang), train_s=0.2)
    trainer.update(batch(0))
    with pytest.raises(ProcessError, match="the trainer process was lost") as caught:
        trainer.update(batch(1))
    gate.set()
    assert len(re.findall(r"was killed: [\d.]+ s for update 1", str(caught.value.got))) == 2, "the second try hangs, too"


def test_an_error_of_the_training_itself_is_not_tried_again() -> None:
    def refuse(step: int) -> None:
        raise ModelError("the loss is not finite", where=f"update {step}")

    trainer = make(lambda: Tiny(refuse))
    with pytest.raises(ModelError, match="not finite"):
        trainer.update(batch(0))


class OpensAfter:
    """A watcher that opens a gate once enough tokens have come since it was told to count."""

    def __init__(self, gate: threading.Event, tokens: int) -> None:
        self.gate, self.left, self.counting = gate, tokens, False

    def on_start(self, samples: Any, time_s: float) -> None:
        pass

    def on_event(self, event: Event) -> None:
        segment = getattr(event, "segment", None)
        if self.counting and segment is not None:
            self.left -= len(segment)
            if self.left <= 0:
                self.gate.set()


def driver_with(trainer: RemoteTrainer, schedule: Any, watcher: OpensAfter) -> Driver:
    clock = WallClock()
    return Driver(
        clock=clock,
        engine=Stepped(lambda sample: 12 if sample.id.serial < 2 else 60),
        rewards=FakeRewards(clock),  # type: ignore[arg-type]
        schedule=schedule,
        prompts=PromptSampler(make_prompts(40)),
        spec=SamplingSpec(max_new_tokens=64),
        groups_per_step=2,
        group_size=2,
        steps=6,
        sources=(trainer,),
        watcher=watcher,
        limits=LIMITS,
    )


def test_an_update_that_waits_for_tokens_gets_them_only_where_rollouts_go_on_beside_it() -> None:
    """The update ends when 40 tokens have come since it began: possible only if both go on at the same time."""
    gate = threading.Event()

    def wait_for_tokens(_step: int) -> None:
        if not gate.wait(30):
            raise Die

    asynchronous = BoundedAsyncSchedule(BoundedAsyncConfig(max_lag_steps=2))
    trainer, watcher = make(lambda: Tiny(wait_for_tokens)), OpensAfter(gate, 40)
    driver = driver_with(trainer, asynchronous, watcher)
    trainer.submit(driver.next_batch())
    watcher.counting = True
    updated = driver.wait_for_update()
    assert updated.version == 1 and watcher.left <= 0
    driver.publish(trainer.weights(), 1, asynchronous.update_mode)
    assert driver.pool.ledger.balanced
    trainer.close()

    gate.clear()
    trainer, watcher = make(lambda: Tiny(wait_for_tokens), train_s=0.3, on_trainer_loss="fail"), OpensAfter(gate, 40)
    driver = driver_with(trainer, SyncSchedule(SyncConfig()), watcher)
    trainer.submit(driver.next_batch())
    watcher.counting = True
    with pytest.raises(ProcessError, match="the trainer process was lost"):
        driver.wait_for_update()  # negative control: the synchronous schedule starts nothing during an update
    assert watcher.left == 40
    gate.set()
