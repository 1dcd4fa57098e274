"""The contract of `april.engines.base.Engine` as a test class: inherit it, say how to make an engine, run pytest.

    class TestMyEngine(EngineContract):
        def make(self, **budgets):
            return MyEngine(...), samples

Parts that an engine does not promise in its `caps` are skipped with the reason.
"""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from april.core.errors import EngineError
from april.core.event import Finished, Parked
from april.core.ids import GroupId
from april.core.sample import Sample
from april.engines.base import Engine, UpdateMode, Weights
from april.testing.engine_run import EngineRun, cut, require, same_tokens

_STOPPED_SAMPLES = 2


class EngineContract:
    """Each method is one line of the contract.

    Attributes:
        score_tolerance: largest difference between `score` and the sampler's log-probs.
        cut_tolerance: largest difference of log-probs between a cut and an uncut run.
        num_cuts: random cuts of each sample.
        children_differ: whether forks have random streams of their own (an engine with fixed replies may have none).
        reuse_finished: whether the undisturbed run is made once for all tests of the class.
        runs_ahead: whether the engine goes on between two polls, in a process of its own; then what was counted at the moment of
            a call is a lower bound.
    """

    score_tolerance = 1e-4
    cut_tolerance = 1e-4
    num_cuts = 3
    children_differ = True
    reuse_finished = True
    runs_ahead = False
    _finished: ClassVar[list[Sample]]

    # -- hooks ----------------------------------------------------------------------------------------------------

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        """A fresh engine, and fresh samples of at least two groups of two, all with room for 12 tokens or more.

        Every call gives the same weights and the same samples.

        Args:
            max_running: samples decoded at once, when the test needs few.
            kv_tokens: KV memory, when the test needs little; at least that of one sample.
        """
        raise unittest.SkipTest("a subclass says how to make the engine")

    def advance(self, engine: Engine) -> None:
        """Called before every poll; move a virtual clock to `engine.ready_at()` here."""

    def new_weights(self) -> Weights:
        """Weights that differ from those of `make`."""
        return {}

    def decode(self, token_ids: Sequence[int]) -> str | None:
        """Text of tokens as the engine decodes it; None when it has no stop strings."""
        return None

    def small_kv_tokens(self) -> int | None:
        """KV memory that holds one sample but not all of `make`; None when there is none to lose."""
        return None

    # -- helpers --------------------------------------------------------------------------------------------------

    def start(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[EngineRun, list[Sample]]:
        """A run that has not begun, and its samples."""
        engine, samples = self.make(max_running=max_running, kv_tokens=kv_tokens)
        return EngineRun(engine, self.advance), samples

    def finished(self) -> list[Sample]:
        """All samples, run without any interruption; once a class, since `make` always gives the same."""
        whole: list[Sample] | None = type(self).__dict__.get("_finished") if self.reuse_finished else None
        if whole is None:
            run, samples = self.start()
            run.submit(samples)
            run.drain()
            whole = run.results(samples)
            type(self)._finished = whole
        return whole

    def repeatable(self) -> list[Sample]:
        """Finished samples that another run would give again: greedy ones where random numbers are not addressed."""
        run, samples = self.start()
        if run.engine.caps.addressed_random:
            return self.finished()
        greedy = [replace(sample, spec=replace(sample.spec, temperature=0.0, top_p=1.0, top_k=0)) for sample in samples]
        run.submit(greedy)
        run.drain()
        return run.results(greedy)

    def needs(self, holds: bool, reason: str) -> None:
        """Skip unless the engine promises this."""
        if not holds:
            raise unittest.SkipTest(reason)

    # -- one life, one end ----------------------------------------------------------------------------------------

    def test_each_sample_has_one_terminal_event(self) -> None:
        run, samples = self.start()
        run.submit(samples)
        run.drain()
        run.poll()
        require(sorted(end.id for end in run.ends) == sorted(sample.id for sample in samples), "each sample ends once", run.ends)
        require(all(isinstance(end, Finished) for end in run.ends), "undisturbed samples finish", run.ends)
        total = sum(map(len, run.results(samples)))
        require(run.engine.load().generated_tokens == total, "every sampled token is reported", (run.engine.load(), total))

    def test_no_more_run_than_promised(self) -> None:
        run, samples = self.start(max_running=2)
        run.submit(samples)
        most = 0
        while run.open:
            run.poll()
            most = max(most, run.engine.load().running)
        require(most <= run.engine.caps.max_running, "at most max_running samples run", most)

    def test_abort_is_idempotent_and_ignores_unknown_ids(self) -> None:
        run, samples = self.start()
        unknown = GroupId(10**6, 0, "nobody").member(0)
        run.engine.abort([unknown])
        run.submit(samples)
        run.until_tokens(len(samples))
        for _ in range(3):
            run.engine.abort([samples[0].id, unknown])
            run.engine.abort()
        run.drain()
        run.engine.abort()
        require(run.poll() == [], "an abort of ended samples has no effect")
        require(len(run.ends) == len(samples), "each sample ends once", run.ends)

    def test_abort_of_a_waiting_sample_changes_nothing(self) -> None:
        run, samples = self.start()
        run.submit(samples)
        run.engine.abort()
        run.drain()
        waited = [isinstance(end, Parked) and end.segment is None for end in run.ends]
        require(all(waited) or self.runs_ahead, "it parks without tokens", run.ends)
        run.submit(run.results([sample for sample in samples if run.samples[sample.id].stop is None]))
        run.drain()
        if run.engine.caps.addressed_random:
            same_tokens(run.results(samples), self.finished(), self.cut_tolerance)

    def test_a_finish_wins_over_an_abort(self) -> None:
        run, samples = self.start()
        run.submit(samples)
        while run.open:
            run.poll()
            run.engine.abort([end.id for end in run.ends])
        require(len(run.ends) == len(samples), "each sample ends once", run.ends)
        require(all(isinstance(end, Finished) for end in run.ends), "a finished sample does not park", run.ends)

    def test_parked_output_is_complete_and_can_be_continued(self) -> None:
        run, samples = self.start()
        run.submit(samples)
        run.until_tokens(3 * len(samples))
        run.engine.abort()
        run.drain()
        parked = [run.samples[end.id] for end in run.ends if isinstance(end, Parked)]
        sampled = sum(map(len, run.results(samples)))
        require(run.engine.load().generated_tokens == sampled, "parked samples carry every sampled token", sampled)
        given = {sample.id: sample.token_ids.tolist() for sample in parked}
        run.submit(parked)
        run.drain()
        for id_, tokens in given.items():
            require(run.samples[id_].token_ids[: len(tokens)].tolist() == tokens, "given tokens stay", id_)
        if run.engine.caps.addressed_random:
            same_tokens(run.results(samples), self.finished(), self.cut_tolerance)

    # -- tokens ---------------------------------------------------------------------------------------------------

    def test_segments_carry_the_version(self) -> None:
        run, samples = self.start()
        version = run.engine.load().version
        run.submit(samples)
        run.drain()
        require({segment.version for _, segment in run.segments} == {version}, "tokens carry the engine's version")
        require(all(segment.sampler for _, segment in run.segments), "a segment names its sampler")

    def test_the_budget_counts_all_segments(self) -> None:
        for sample in self.finished():
            budget = min(len(sample), 9)
            if budget < 4:
                continue
            run, _ = self.start()
            spec = replace(sample.spec, max_new_tokens=budget, stop_token_ids=(), stop_strings=())
            run.submit([replace(cut(sample, 3), spec=spec)])
            run.drain()
            result = run.samples[sample.id]
            require(len(result) == budget and result.stop == "length", "given tokens count for the budget", result)
            require(result.token_ids[:3].tolist() == sample.token_ids[:3].tolist(), "given tokens are not sampled again", result)

    def test_cut_anywhere_gives_the_same_tokens(self) -> None:
        whole = self.finished()
        run, samples = self.start()
        self.needs(run.engine.caps.addressed_random, "caps.addressed_random is false")
        random = np.random.default_rng(0)
        for _ in range(self.num_cuts):
            run, samples = self.start(max_running=int(random.integers(1, len(samples) + 1)))
            order = random.permutation(len(samples))
            again = [cut(whole[index], int(random.integers(0, len(whole[index])))) for index in order]
            for chunk in np.array_split(np.arange(len(again)), 3):
                run.submit([again[index] for index in chunk])
                run.poll()
            run.drain()
            same_tokens(run.results(samples), whole, self.cut_tolerance)

    def test_losing_kv_changes_no_token(self) -> None:
        kv_tokens = self.small_kv_tokens()
        self.needs(kv_tokens is not None, "this engine has no KV to lose")
        run, samples = self.start(kv_tokens=kv_tokens)
        self.needs(run.engine.caps.addressed_random, "caps.addressed_random is false")
        run.submit(samples)
        run.drain()
        require(run.engine.load().preemptions > 0, "the small memory makes samples lose their KV", run.engine.load())
        same_tokens(run.results(samples), self.finished(), self.cut_tolerance)

    def test_children_share_tokens_and_leave_the_parent_alone(self) -> None:
        whole = self.finished()
        run, samples = self.start()
        parents = [cut(sample, len(sample) // 2) for sample in whole]
        children = [parent.forked(len(parent), str(branch)) for parent in parents for branch in range(2)]
        run.submit(parents)
        run.poll()
        run.submit(children)
        run.drain()
        for child in children:
            tokens = run.samples[child.id].token_ids[: len(child)].tolist()
            require(tokens == child.token_ids.tolist(), "a child keeps the parent's tokens", child.id)
        if run.engine.caps.addressed_random:
            same_tokens(run.results(samples), whole, self.cut_tolerance)
        if self.children_differ:
            first, second = run.results(children[0::2]), run.results(children[1::2])
            differ = [a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(first, second, strict=True)]
            require(any(differ), "children have random streams of their own", first)

    # -- log-probs ------------------------------------------------------------------------------------------------

    def test_score_equals_the_sampler(self) -> None:
        whole = self.finished()
        run, _ = self.start()
        self.needs(run.engine.caps.score, "caps.score is false")
        scores = run.engine.score(whole)
        for sample, score in zip(whole, scores, strict=True):
            require(score.shape == (len(sample),), "one log-prob for each response token", score.shape)
            worst = float(np.abs(score - sample.behaviour_logprobs).max())
            require(worst <= self.score_tolerance, f"score equals the sampler's log-probs within {self.score_tolerance}", worst)

    def test_entropies_on_request(self) -> None:
        run, samples = self.start()
        self.needs(run.engine.caps.entropy, "caps.entropy is false")
        asked = [replace(sample, spec=replace(sample.spec, entropy=True)) for sample in samples[::2]]
        run.submit([*asked, *samples[1::2]])
        run.drain()
        for sample in run.results(asked):
            require(sample.entropies is not None, "entropies are recorded on request", sample.id)
            require(sample.entropies is None or bool((sample.entropies >= -1e-6).all()), "an entropy is not negative", sample.id)
        require(all(sample.entropies is None for sample in run.results(samples[1::2])), "only on request")

    # -- stop strings ---------------------------------------------------------------------------------------------

    def test_stop_strings_match_across_a_segment_boundary(self) -> None:
        tested = 0
        self.needs(self.decode([0]) is not None, "this engine has no stop strings")
        for sample in self.repeatable():
            end = len(sample) - 2
            text = (self.decode(sample.token_ids[:end].tolist()) or "") if end >= 6 else ""
            invisible = end >= 6 and text == self.decode(sample.token_ids[: end - 1].tolist())
            if tested == _STOPPED_SAMPLES or len(text) < 4 or invisible or text[-4:] in text[:-1]:
                continue
            tested += 1
            for given in (0, end - 2):
                run, _ = self.start()
                spec = replace(sample.spec, stop_strings=("never there", text[-4:]))
                run.submit([replace(cut(sample, given), spec=spec)])
                run.drain()
                result = run.samples[sample.id]
                require(result.stop == "stop", "a stop string ends the sample", result.stop)
                require(result.token_ids.tolist() == sample.token_ids[:end].tolist(), "it is cut at its last token", result)
        require(tested > 0, "some sample of `make` can be stopped by a string")

    # -- refusals -------------------------------------------------------------------------------------------------

    def test_a_bad_sample_rejects_the_whole_call(self) -> None:
        whole = self.finished()
        run, samples = self.start()
        used_up = replace(cut(whole[0], 3), spec=replace(whole[0].spec, max_new_tokens=3))
        too_long = replace(samples[0], spec=replace(samples[0].spec, max_new_tokens=10**9))
        bad = {"finished": whole[0], "without budget": used_up, "twice in one call": samples[1]}
        if run.engine.caps.max_sample_tokens == run.engine.caps.kv_tokens:
            bad["longer than the KV memory"] = too_long
        for name, sample in bad.items():
            require(_refuses(run.engine, [samples[1], sample]), f"a sample that is {name} is refused")
        require(run.engine.load().waiting + run.engine.load().running == 0, "a refused call leaves nothing", run.engine.load())
        run.submit(samples)
        run.poll()
        live = sorted(run.open)[0]
        require(_refuses(run.engine, [run.samples[live]]), "an id that is running is refused")
        run.drain()

    # -- weights --------------------------------------------------------------------------------------------------

    def _updated(self, mode: UpdateMode) -> tuple[EngineRun, list[Sample], int, int]:
        """A run whose weights change half-way: with the numbers of tokens and of started samples at that moment."""
        run, samples = self.start(max_running=2)
        self.needs(mode in run.engine.caps.update_modes, f"update mode {mode!r} is not in caps.update_modes")
        run.submit(samples)
        run.until_tokens(4)
        started = run.engine.load().running + len(run.ends)
        num_tokens = run.engine.load().generated_tokens
        run.engine.update_weights(self.new_weights(), run.engine.load().version + 1, mode)
        run.drain()
        require(run.engine.load().version == 1, "the new version is live in the end", run.engine.load().version)
        return run, samples, num_tokens, started

    def _counted(self, found: int, at_call: int) -> bool:
        return found >= at_call if self.runs_ahead else found == at_call

    def test_drain_lets_running_samples_finish(self) -> None:
        run, samples, _, started = self._updated("drain")
        versions = [set(sample.versions.tolist()) for sample in run.results(samples)]
        require(all(len(found) == 1 for found in versions), "no sample sees two versions", versions)
        require(
            self._counted(versions.count({0}), started),
            "exactly those that had started keep the old weights",
            (versions, started),
        )
        quiet, _ = self.start()
        quiet.engine.update_weights(self.new_weights(), 1, "drain")
        quiet.poll()
        require(quiet.engine.load().version == 1, "an idle engine switches at once")

    def test_recompute_continues_under_the_new_weights(self) -> None:
        run, samples, num_tokens, _ = self._updated("recompute")
        results = run.results(samples)
        old = [int((sample.versions == 0).sum()) for sample in results]
        require(self._counted(sum(old), num_tokens), "tokens carry the version that sampled them", (old, num_tokens))
        require(any(0 < count < len(sample) for count, sample in zip(old, results, strict=True)), "some sample goes on")
        if run.engine.caps.addressed_random:
            again, _ = self.start()
            again.engine.update_weights(self.new_weights(), 1, "recompute")
            again.submit([cut(sample, count) for sample, count in zip(results, old, strict=True) if count < len(sample)])
            again.drain()
            moved = [sample for sample, count in zip(results, old, strict=True) if count < len(sample)]
            same_tokens(again.results(moved), moved, self.cut_tolerance)

    def test_keep_kv_is_another_sampler(self) -> None:
        run, samples, num_tokens, _ = self._updated("keep_kv")
        results = run.results(samples)
        old = sum(int((sample.versions == 0).sum()) for sample in results)
        require(self._counted(old, num_tokens), "tokens carry their version", (old, num_tokens))
        mixed = [sample for sample in results if len(set(sample.versions.tolist())) == 2]
        require(len(mixed) > 0, "some sample goes on")
        for sample in mixed:
            require(len({span.sampler for span in sample.spans}) == 2, "tokens on old KV have another sampler", sample.spans)


def _refuses(engine: Engine, samples: Sequence[Sample]) -> bool:
    try:
        engine.submit(samples)
    except EngineError:
        return True
    return False
