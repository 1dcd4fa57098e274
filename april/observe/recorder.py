"""Keeps some of what the policy said, so that early and late answers can be read side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from april.core.group import Group, Reward
from april.core.ids import Version
from april.core.sample import Sample
from april.observe.sinks import JsonlSink, read_lines

Decode = Callable[[Sequence[int]], str]

MAX_REMEMBERED = 64
"""Prompts that are looked for again; more would make each step's transcripts a different set."""


class Recorder:
    """Writes a few groups of each recorded step to transcripts.jsonl.

    Args:
        sink: the transcripts file; prompts it already holds (a resumed run) are revisited.
        decode: token ids to text.
        num_groups: groups kept a recorded step.
        max_responses: members kept a group.
        every: record steps 0, every, 2 every, ...
    """

    def __init__(self, sink: JsonlSink, decode: Decode, *, num_groups: int = 2, max_responses: int = 8, every: int = 1) -> None:
        self._sink, self._decode = sink, decode
        self._num_groups, self._max_responses, self._every = num_groups, max_responses, max(1, every)
        self._known: dict[str, int] = {}
        for record in read_lines(sink.path):
            self._remember(str(record.get("prompt_id")))

    def record(self, step: int, groups: Sequence[Group], version: Version, *, source: str = "train") -> int:
        """Write the chosen groups of one step.

        Args:
            step: number of the update.
            groups: candidates, in any order.
            version: weights at that time; shown beside the versions that sampled the tokens.
            source: "train" or "evaluation".

        Returns:
            Number of groups written.
        """
        if step % self._every:
            return 0
        chosen = choose(groups, self._num_groups, self._known)
        self._sink.write_all([self._entry(step, group, version, source) for group in chosen])
        for group in chosen:
            self._remember(group.id.prompt)
        return len(chosen)

    def _remember(self, prompt_id: str) -> None:
        if len(self._known) < MAX_REMEMBERED:
            self._known.setdefault(prompt_id, len(self._known))

    def _entry(self, step: int, group: Group, version: Version, source: str) -> dict[str, Any]:
        pairs = list(zip(group.samples, group.outcomes, strict=True))[: self._max_responses]
        responses = []
        for sample, outcome in pairs:
            response = self._response(sample)
            if isinstance(outcome, Reward):
                response |= {"reward": outcome.value, "correct": outcome.correct, "parts": dict(outcome.parts)}
            else:
                response |= {"reward": None, "correct": False, "failure": outcome.reason}
            responses.append(response)
        prompt = group.prompt.text or self._decode(group.prompt.token_ids.tolist())
        return {
            "step": step,
            "version": version,
            "source": source,
            "prompt_id": group.id.prompt,
            "group": str(group.id),
            "prompt": prompt,
            "responses": responses,
        }

    def _response(self, sample: Sample) -> dict[str, Any]:
        """Text, and for each span its tokens [start, end), version, and where it ends in the text."""
        ids = sample.token_ids.tolist()
        text = self._decode(ids)
        # A prefix is decoded, not the span alone: tokens may share a character or a leading space.
        inner = [min(len(text), len(self._decode(ids[: span.end]))) for span in sample.spans[:-1]]
        return {
            "text": text,
            "tokens": len(ids),
            "stop": sample.stop,
            "segments": [[span.start, span.end, span.version] for span in sample.spans],
            "text_ends": [*inner, len(text)] if sample.spans else [],
        }


def choose(groups: Sequence[Group], num_groups: int, known: dict[str, int]) -> list[Group]:
    """The groups worth reading, the same for the same input in any order.

    The first is one with mixed rewards (where the policy can learn), the others are prompts that were shown before,
    then mixed ones, then those that were parked most, then the oldest.
    """

    def rank(group: Group) -> tuple[Any, ...]:
        unseen = len(known)
        parked = sum(sample.num_segments - 1 for sample in group.samples)
        return (known.get(group.id.prompt, unseen), -reward_spread(group), -parked, group.id)

    ordered = sorted(groups, key=rank)
    mixed = next((group for group in ordered if reward_spread(group) > 0), None)
    if mixed is not None:
        ordered = [mixed] + [group for group in ordered if group is not mixed]
    return ordered[:num_groups]


def reward_spread(group: Group) -> float:
    """Standard deviation of the rewards of a group; 0 when fewer than two members have one."""
    rewards = [reward.value for _, reward in group.sampled.rewarded]
    return statistics.pstdev(rewards) if len(rewards) > 1 else 0.0
