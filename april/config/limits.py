"""How long each wait may take, and what happens when it takes longer. Every wait of a run has one of these as its deadline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config


class LimitsConfig(Config):
    """Deadlines, and what becomes of what was waited for."""

    start_s: float = Field(300.0, gt=0, description="a child process may take this long to load before it is given up")
    engine_silence_s: float = Field(
        120.0, gt=0, description="an engine in a child process that has work and says nothing for this long is killed"
    )
    train_s: float = Field(3600.0, gt=0, description="a trainer in a child process may take this long for one update or one save")
    park_s: float = Field(300.0, gt=0, description="samples that were stopped must leave the engine within this time")
    publish_s: float = Field(
        600.0, gt=0, description="an engine that makes no progress for this long while new weights wait for it is late"
    )
    quiet_s: float = Field(
        1800.0, gt=0, description="a run in which nothing at all happens for this long ends, and says who waits for what"
    )
    on_engine_loss: Literal["redispatch", "retry", "drop", "fail"] = Field(
        "redispatch",
        description="samples of an engine that died or hung: redispatch parks them with their tokens, for the schedule to "
        "start again; retry gives them to the restarted engine at once; drop ends them as failed; fail ends the run",
    )
    sample_losses: int = Field(3, ge=0, description="how often a sample may lose its engine before it fails")
    on_reward_failure: Literal["drop", "retry", "fail"] = Field(
        "drop", description="a sample without a reward: drop ends it as failed; retry judges it again first; fail ends the run"
    )
    reward_retries: int = Field(1, ge=1, description="how often a sample is judged again with on_reward_failure = retry")
    on_trainer_loss: Literal["retry", "fail"] = Field(
        "retry",
        description="a trainer that died or hung: retry makes its state again from the newest checkpoint, bit for bit, and "
        "trains on the batch once more; fail ends the run, which can be resumed",
    )
    on_late_publish: Literal["retry", "fail"] = Field(
        "retry", description="an engine that is late with new weights: retry restarts it on them; fail ends the run"
    )
    restarts: int = Field(3, ge=0, description="restarts of one process within restart_window_s; one more ends the run")
    restart_window_s: float = Field(600.0, gt=0, description="the time over which restarts are counted")
    restart_pause_s: float = Field(1.0, ge=0, description="pause before a restart; each further one doubles it")
