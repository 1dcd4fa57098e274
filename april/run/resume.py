"""Save a run and continue it: nothing lost, nothing trained twice.

A run's state is its newest checkpoint plus the journal written since. To continue, the checkpoint is loaded and the journal
replayed through the same transitions: groups come back with their tokens, and updates that the checkpoint has not seen are
done again on the very groups that were emitted, so each version is made once from the same data. What was running waits
again, with the tokens that were written down ("tokens"); or the interrupted step is generated again from its start
("step"), which repeats the uninterrupted run bit for bit on a deterministic engine.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from april.checkpoint.codec import decode_frames, encode
from april.checkpoint.journal import Journal, Record, read_journal, rewrite_journal
from april.checkpoint.store import step_of
from april.config.load import read_toml
from april.config.resolve import changes
from april.core.errors import CheckpointError
from april.core.group import Batch
from april.core.metric import Metrics
from april.rollout.snapshot import REPLAYED, load_pool_state, park_running, pool_state, replay
from april.run.build import Parts, open_journal

START = "start"
Replayed = Callable[[Batch, Metrics], None]


def save_checkpoint(parts: Parts, journal: Journal | None) -> Journal | None:
    """Write a checkpoint, begin its journal and drop the journals of checkpoints that are gone.

    The engine must hold no sample. Returns the new journal, None where the recipe wants none.
    """

    def write(folder: Path) -> None:
        parts.trainer.save(folder, parts.tokenizer.backend)
        (folder / "rollout.bin").write_bytes(encode(_rollout_state(parts)))

    folder = parts.store.save(parts.driver.emitted_steps, write)
    if journal is None:
        return None
    journal.close()
    opened = open_journal(parts, folder.name)
    alive = {path.name for path in parts.store.all()}
    for old in (parts.folder / "journal").glob("*.bin"):
        if old.stem not in alive:
            old.unlink()
    return opened


def _rollout_state(parts: Parts) -> dict[str, Any]:
    driver = parts.driver
    return {
        "pool": pool_state(parts.pool),
        "prompts": parts.prompts.state_dict(),
        "lengths": driver.lengths.state_dict(),
        "adaptive": driver.spec.adaptive,
        "memo": dict(driver.memo),
        "emitted_steps": driver.emitted_steps,
        "version": driver.version,
    }


def restore(parts: Parts, replayed: Replayed = lambda _batch, _metrics: None) -> Journal | None:
    """Bring freshly built parts to where the run stopped; the journal listens again afterwards.

    Args:
        parts: from `build`, with the recipe of the run.
        replayed: told of each update that was done again.

    Returns:
        the journal, open again; None where the recipe wants none.

    Raises:
        CheckpointError: the newest checkpoint or the journal is damaged.
    """
    folder = parts.store.latest()
    name = START if folder is None else folder.name
    if folder is not None:
        _load_checkpoint(parts, folder)
    path = parts.folder / "journal" / f"{name}.bin"
    records = _kept(parts, read_journal(path, parts.data.by_id), path)
    unfinished = _replay(parts, records, replayed)
    journal = open_journal(parts, name) if parts.recipe.checkpoint.journal else None
    _settle(parts, unfinished, replayed)
    parts.engine.update_weights(parts.trainer.weights(), parts.trainer.version, "drain")
    parts.driver.version = parts.trainer.version
    return journal


def _load_checkpoint(parts: Parts, folder: Path) -> None:
    state = decode_frames((folder / "rollout.bin").read_bytes(), str(folder / "rollout.bin"), parts.data.by_id)[0]
    parts.trainer.load(folder)
    load_pool_state(parts.pool, state["pool"])
    parts.prompts.load_state_dict(state["prompts"])
    parts.driver.lengths.load_state_dict(state["lengths"])
    parts.driver.adapt(state.get("adaptive"))
    parts.driver.memo, parts.driver.emitted_steps = state["memo"], state["emitted_steps"]
    parts.driver.version = parts.trainer.version
    if not parts.trainer.version == state["version"] == step_of(folder):
        raise CheckpointError(
            "the parts of a checkpoint disagree", where=str(folder), got=(parts.trainer.version, state["version"])
        )


def _kept(parts: Parts, records: list[Record], path: Path) -> list[Record]:
    """The records to replay; with "step", those of the interrupted step are dropped from the file, too."""
    mode = parts.recipe.checkpoint.continue_from
    if mode == "auto":
        mode = "step" if parts.driver.schedule.max_lag_steps == 0 else "tokens"
    if mode == "tokens":
        return records
    last = max((index for index, (name, _) in enumerate(records) if name in ("emit", "trained")), default=-1)
    kept = records[: last + 1]
    if len(kept) < len(records):
        rewrite_journal(path, kept)
    return kept


def _replay(parts: Parts, records: list[Record], replayed: Replayed) -> Batch | None:
    """Apply the journal; returns a batch that was emitted and whose update was not confirmed."""
    driver, batch = parts.driver, None
    for name, arguments in records:
        if name == "cursor":
            parts.prompts.load_state_dict(arguments["state"])
        elif name not in REPLAYED:
            raise CheckpointError("a journal holds a record that this version does not know", where=str(parts.folder), got=name)
        elif name == "trained":
            if batch is None:
                raise CheckpointError("a journal confirms an update of no batch", where=str(parts.folder))
            replayed(batch, parts.trainer.update(batch))
            parts.pool.trained()
            driver.version, batch = parts.trainer.version, None
        else:
            result = replay(parts.pool, name, arguments)
            if name in ("finish", "stop"):
                driver.lengths.finished(len(result))
            elif name == "emit":
                batch = driver.take(result, arguments["max_token_lag"])
    parts.pool.ledger.check()
    return batch


def _settle(parts: Parts, unfinished: Batch | None, replayed: Replayed) -> None:
    """Finish what the crash cut: the update of an emitted batch, samples in the engine, rewards not yet given."""
    if unfinished is not None:
        replayed(unfinished, parts.trainer.update(unfinished))
        parts.pool.trained()
        parts.driver.version = parts.trainer.version
    park_running(parts.pool)
    parts.driver.settle_unjudged()


def adopt_recipe(parts: Parts) -> list[str]:
    """Make the present recipe the run's own; returns what changed, one line a value."""
    path = parts.folder / "recipe.toml"
    changed = changes(read_toml(path), parts.resolved.values())
    if changed:
        aside = path.with_suffix(".tmp")
        aside.write_text(parts.resolved.to_toml())
        aside.replace(path)
    return changed


def discard_run(folder: Path) -> None:
    """Remove what a run keeps to be continued; what it has shown stays."""
    for name in ("checkpoints", "journal"):
        shutil.rmtree(folder / name, ignore_errors=True)
