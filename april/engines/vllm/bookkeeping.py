"""What both vLLM engines do alike: which samples they refuse, their counters, and that they do not score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt

from april.core.errors import EngineError
from april.core.ids import SampleId, Version
from april.core.sample import Sample
from april.engines.admission import check_admission
from april.engines.base import Caps, Load
from april.engines.vllm.request import Settings


class Bookkeeping:
    """The part of `april.engines.base.Engine` that needs no vLLM."""

    name: str
    caps: Caps
    _live: Mapping[SampleId, Any]
    _running: Mapping[str, Any]
    _waiting: Sized
    _version: Version
    _counts: Mapping[str, int]
    _busy_s: float
    _slot_s: float

    def _check(self, samples: Sequence[Sample], settings: Settings) -> None:
        """All samples of one call may run.

        Raises:
            EngineError: one of them may not; then none has been taken.
        """
        check_admission(samples, self._live, self.caps.max_sample_tokens)
        for sample in samples:
            settings.check(sample)

    def _check_idle(self) -> None:
        """It may sleep.

        Raises:
            EngineError: samples are here.
        """
        if self._live:
            raise EngineError("an engine with samples cannot sleep", where=self.name, got=f"{len(self._live)} samples")

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        """Not available: vLLM's log-probs of given tokens ignore the sample's temperature.

        Raises:
            EngineError: always; `caps.score` says so beforehand.
        """
        raise EngineError(
            "vLLM does not score given tokens", where="engine.type", got="score", expected="an engine whose caps say so"
        )

    def load(self) -> Load:
        """Counters; `slot_s / busy_s` is the mean occupied fraction."""
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_tokens=sum(len(request.context) + request.num_sampled for request in self._running.values()),
            version=self._version,
            generated_tokens=self._counts["generated"],
            prefill_tokens=self._counts["prefill"],
            shared_tokens=self._counts["shared"],
            busy_s=self._busy_s,
            slot_s=self._slot_s,
        )
