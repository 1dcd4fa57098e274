"""The one loop: next batch -> update -> publish -> report -> maybe checkpoint -> maybe evaluate.

Synchronous, partial and asynchronous runs differ only in what the schedule plans and in where the sources compute.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from april.checkpoint.journal import Journal
from april.config.resolve import Resolved
from april.core.errors import CheckpointError, DataError, Interrupted
from april.core.group import Batch
from april.core.metric import Metrics, Sum, values
from april.core.random import stream_key
from april.distributed.remote_trainer import RemoteTrainer
from april.observe.report import write_report
from april.observe.sinks import read_jsonl
from april.observe.status import STATUS_FILE, StatusWriter
from april.observe.trace import write_trace
from april.run.build import Parts, build, open_journal, sampling_spec
from april.run.colocated import engines_asleep
from april.run.elastic import ElasticEngines
from april.run.evaluate import Evaluation, evaluate
from april.run.folders import run_folder
from april.run.progress import describe_run
from april.run.resume import START, adopt_recipe, discard_run, restore, save_checkpoint
from april.run.summary import summarise, write_summary
from april.run.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Result:
    """A run that ended.

    Attributes:
        folder: everything it wrote.
        summary: as in summary.json.
        interrupted: whether it was asked to stop before its last step.
    """

    folder: Path
    summary: dict[str, Any]
    interrupted: bool = False


class StopFlag:
    """Turns the first SIGINT or SIGTERM into a request to stop at the next event; the second one interrupts at once.

    Args:
        talk: whether to say so on standard error.
    """

    def __init__(self, talk: bool = False) -> None:
        self.asked, self._talk = False, talk

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the body runs; outside the main thread, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._talk:  # not print: the signal may have come in the middle of one
            os.write(2, b"\nstopping after the next event, with a checkpoint; once more ends at once\n")


class Run:
    """A run in progress.

    Args:
        resolved: its recipe.
        resume: continue what its folder holds.
        quiet: plain lines instead of the live view; None: no output.
        on_step: called with each row of metrics.
        reward: judges in place of the recipe's reward.

    Raises:
        CheckpointError: the folder holds another run and `resume` was not asked for, or there is nothing to resume.
    """

    def __init__(
        self,
        resolved: Resolved,
        *,
        resume: bool = False,
        quiet: bool | None = False,
        on_step: Callable[[dict[str, Any]], None] = lambda _row: None,
        reward: Callable[..., Any] | None = None,
    ) -> None:
        self.stop, self.on_step = StopFlag(talk=quiet is not None), on_step
        _check_folder(run_folder(resolved.recipe), resume)
        self.parts: Parts = build(resolved, reward=reward, should_stop=self.stop)
        self.journal: Journal | None = None
        self._missed: list[tuple[Batch, Metrics]] = []
        self._changed: list[str] = []
        with ExitStack() as on_error:
            on_error.callback(self.parts.close)
            self._begin(resume, quiet)
            on_error.pop_all()

    def _begin(self, resume: bool, quiet: bool | None) -> None:
        parts, recipe = self.parts, self.parts.recipe
        if isinstance(parts.trainer, RemoteTrainer):
            parts.trainer.start()
        if resume:
            self.journal = restore(parts, lambda batch, metrics: self._missed.append((batch, metrics)))
            self._changed = adopt_recipe(parts)
        self.telemetry = Telemetry(
            parts.folder,
            parts.clock,
            title=recipe.name,
            steps=recipe.steps,
            first_step=parts.driver.emitted_steps,
            decode=parts.tokenizer.decode,
            observe=recipe.observe,
            quiet=quiet,
            clips_samples=getattr(recipe.algorithm.ratio, "whole_samples", False),
        )
        parts.driver.watcher = self.telemetry.watcher
        self.engines = ElasticEngines(parts, lambda text: self.telemetry.view.note(text))
        self.status = StatusWriter(parts.folder, lambda: describe_run(parts, self.engines.describe()))
        parts.driver.on_turn = self.status.beat
        if isinstance(parts.trainer, RemoteTrainer):
            parts.trainer.on_turn = self.status.beat
        if not resume:
            (parts.folder / "recipe.toml").write_text(parts.resolved.to_toml())
            self.telemetry.environment()
            self.journal = open_journal(parts, START) if recipe.checkpoint.journal else None

    def run(self) -> Result:
        """Train to the last step, or until asked to stop; no process of the run is left behind."""
        try:
            self.status.write()
            result = self._run()
            self.status.write("interrupted" if result.interrupted else "finished")
            return result
        except BaseException as error:
            self.status.write("failed", (str(error) or type(error).__name__).splitlines()[0])
            raise
        finally:
            self._close()

    def add_engine(self) -> str:
        """Start another engine beside those of the run, which joins between two steps; returns its name.

        Raises:
            RecipeError: the run has no pool of engines in processes of their own.
        """
        return self.engines.add()

    def remove_engine(self, name: str, *, finish: bool = False) -> None:
        """Let an engine go, from `on_step` or wherever no step goes on; see `ElasticEngines.remove`.

        Raises:
            EngineError: there is no such engine, or no other one.
        """
        self.engines.remove(name, finish=finish)

    def _close(self) -> None:
        self.engines.close()
        self.parts.close()

    def _run(self) -> Result:
        parts, telemetry = self.parts, self.telemetry
        with self.stop.listening(), telemetry.view:
            for change in self._changed:
                telemetry.view.note(f"the recipe of this run changes: {change}")
            for batch, metrics in self._missed:
                telemetry.trained(batch, telemetry.row(batch, parts.driver, values(metrics), {}, parts.engine.load()))
            try:
                if parts.driver.emitted_steps == 0:
                    self.evaluate(0)
                while parts.driver.emitted_steps < parts.recipe.steps:
                    self.engines.turn()
                    self._step()
                self.evaluate(parts.recipe.steps)
            except Interrupted:
                return self._interrupted()
            self._checkpoint()
        return self._finish(interrupted=False)

    def _step(self) -> None:
        parts, telemetry, before = self.parts, self.telemetry, self.parts.engine.load()
        driver, seconds, enter = parts.driver, dict[str, float](), self.status.enter
        enter("rollout")
        with _timed(seconds, "rollout_s"), telemetry.timeline.span("driver", "rollout"):
            batch = driver.next_batch()
        cut = parts.engine.load()
        enter("update")
        with _timed(seconds, "train_s"), telemetry.timeline.span("trainer", "update"):
            with engines_asleep(parts):
                parts.trainer.submit(batch)
                updated = driver.wait_for_update()
            overlap_tokens = parts.engine.load().generated_tokens - cut.generated_tokens
        enter("publish")
        with _timed(seconds, "publish_s"), telemetry.timeline.span("driver", "publish"):
            driver.publish(parts.trainer.weights(), updated.version, driver.schedule.update_mode)
        if self.journal is not None:
            self.journal.flush(fsync=parts.recipe.checkpoint.fsync)
        learned = updated.metrics
        if parts.transport is not None:
            learned = learned | parts.transport.take_metrics() | {"overlap_tokens": Sum(overlap_tokens)}
        row = telemetry.row(batch, driver, values(learned), seconds, before)
        telemetry.trained(batch, row)
        self.on_step(row)
        done, recipe = driver.emitted_steps, parts.recipe
        if recipe.checkpoint.every_steps and done % recipe.checkpoint.every_steps == 0 and done < recipe.steps:
            self._checkpoint()
        if recipe.evaluation.every_steps and done % recipe.evaluation.every_steps == 0 and done < recipe.steps:
            self.evaluate(done)

    def evaluate(self, step: int) -> list[Evaluation]:
        """Held-out accuracy under the present weights, in the modes that are not written down for this step yet."""
        parts, done = self.parts, []
        known = {record["mode"] for record in read_jsonl(parts.folder / "evaluations.jsonl") if record["step"] == step}
        for mode in [mode for mode in parts.recipe.evaluation.modes if mode not in known]:
            parts.driver.park_all()  # one version for all problems, and nothing of the training runs beside them
            self.status.enter(f"evaluate {mode}")
            self.telemetry.view.status(f"evaluating on {len(parts.data.held_out)} held-out problems, {mode}")
            with self.telemetry.timeline.span("driver", f"evaluate {mode}"):
                result = evaluate_parts(parts, mode, lambda _done: self.status.beat())
            _check_judged(result, step)
            self.telemetry.evaluated(result, step)
            done.append(result)
        self.telemetry.view.status("")
        return done

    def _checkpoint(self) -> None:
        self.status.enter("checkpoint", at_once=True)  # nothing can be written before it is done, but by a remote trainer
        with self.telemetry.timeline.span("driver", "checkpoint"):
            self.journal = save_checkpoint(self.parts, self.journal)

    def _interrupted(self) -> Result:
        self.parts.driver.park_all()
        self._checkpoint()
        self.telemetry.view.note(
            f"stopped at step {self.parts.driver.emitted_steps}; `april train --resume {self.parts.folder}` goes on"
        )
        return self._finish(interrupted=True)

    def _finish(self, interrupted: bool) -> Result:
        parts, folder = self.parts, self.parts.folder
        self.telemetry.close()
        if self.journal is not None:
            self.journal.close()
        self._close()
        summary = summarise(folder, parts.pool.ledger.to_dict(), parts.pool.ledger.balanced)
        write_summary(folder, summary)
        if parts.recipe.observe.timeline:
            write_trace(folder / "timeline.jsonl", folder / "trace.json")
        write_report(folder)
        return Result(folder, summary, interrupted)


def _check_judged(evaluation: Evaluation, step: int) -> None:
    """A reward that fails on every response before the first step will not get better."""
    if step == 0 and sum(evaluation.failures.values()) == len(evaluation.outcomes):
        raise DataError(
            "the reward fails on every response",
            where="reward",
            got=evaluation.failures.most_common(1)[0][0],
            expected="one number, named parts, or an april.Reward for each response",
            hint="correct the reward: it is called with (text, sample, item)",
        )


def evaluate_parts(parts: Parts, mode: str, progress: Callable[[int], None] = lambda _done: None) -> Evaluation:
    """Evaluate the engine's weights as the recipe says; sampled mode is at temperature 1 whatever training uses."""
    options = parts.recipe.evaluation
    trained = sampling_spec(parts.recipe, parts.tokenizer)
    spec = type(trained)(
        max_new_tokens=trained.max_new_tokens,
        stop_token_ids=trained.stop_token_ids,
        stop_strings=trained.stop_strings,
        seed=stream_key(options.seed, "evaluation"),
    )
    return evaluate(
        parts.engine,
        parts.data.held_out,
        parts.verifier,
        parts.tokenizer.decode,
        spec,
        mode=mode,
        num_samples=options.num_samples,
        timeout_s=parts.recipe.scoring.timeout_s,
        progress=progress,
        should_stop=parts.driver.should_stop,
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _check_folder(folder: Path, resume: bool) -> None:
    begun = (folder / "recipe.toml").exists()
    if resume and not begun:
        raise CheckpointError(
            "there is no run to continue",
            where=str(folder),
            got="no recipe.toml",
            expected="the folder of a run that was begun",
            hint="check out=..., or start the run without --resume",
        )
    if begun and not resume:
        raise CheckpointError(
            "the folder holds a run already",
            where=str(folder),
            got="recipe.toml",
            expected="a folder without a run",
            hint=f"continue: `april train --resume {folder}`; start over: --overwrite; keep both: out=ANOTHER_FOLDER",
        )


def overwrite(folder: Path) -> None:
    """Forget the run in a folder, so that a new one can begin there."""
    discard_run(folder)
    records = ("metrics", "evaluations", "transcripts", "lengths", "timeline")
    for name in ("recipe.toml", STATUS_FILE, *(f"{record}.jsonl" for record in records), "summary.json"):
        (folder / name).unlink(missing_ok=True)
