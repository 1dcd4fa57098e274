"""What a task graph is worth: expected success of its output, minus what its tasks cost (Opus)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.rewards.base import UNANSWERED, Verifier

MAX_TASKS = 16
"""All outcomes of this many tasks are summed, one by one."""

Graph = Mapping[str, Sequence[str]]


class WorkflowReward(Config):
    """Expected worth of the task graph in the response: JSON, task -> the tasks that it waits for, the output last."""

    type: Literal["workflow"] = "workflow"
    answer_pattern: str = Field(r"(?s)\{.*\}", description="Regular expression that finds the graph (last match).")
    gain: float = Field(1.0, description="Worth of a successful output.")
    cost_weight: float = Field(1.0, ge=0, description="Factor of the cost of all tasks.")
    penalty_weight: float = Field(0.0, ge=0, description="Factor of the coupling: the share of possible edges that are used.")

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str) -> str:
        return checked_pattern(value) or value

    def build(self) -> Verifier:
        """The verifier."""
        return Workflow(self.answer_pattern, self.gain, self.cost_weight, self.penalty_weight)


@dataclass(frozen=True, slots=True)
class Workflow:
    """Judges a task graph. The item holds "tasks": name -> p (success after all parents succeeded), q (after some failed),
    cost. A response without a graph over these tasks, or with a cycle, is unanswered."""

    answer_pattern: str
    gain: float = 1.0
    cost_weight: float = 1.0
    penalty_weight: float = 0.0

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        tasks = item["tasks"]
        graph = parsed_graph(last_match(text, self.answer_pattern), tasks)
        if graph is None:
            return UNANSWERED
        success = {name: (float(tasks[name]["p"]), float(tasks[name].get("q", 0.0))) for name in graph}
        p_output = success_probability(graph, success, output=list(graph)[-1])
        cost = math.fsum(float(tasks[name].get("cost", 0.0)) for name in graph)
        value = workflow_value(p_output, cost, {"coupling": coupling(graph)}, self.gain, self.cost_weight, self.penalty_weight)
        return Reward(value, p_output >= 0.5, {"answered": 1.0, "p_output": p_output, "cost": cost})


def parsed_graph(text: str | None, known: Mapping[str, Any]) -> Graph | None:
    """Task -> parents from JSON; None when it is no acyclic graph over known tasks."""
    try:
        data = json.loads(text or "")
    except ValueError:
        return None
    if not isinstance(data, dict) or not data or len(data) > MAX_TASKS:
        return None
    graph = {
        str(name): [str(parent) for parent in parents] if isinstance(parents, list) else None for name, parents in data.items()
    }
    if any(parents is None or name not in known or not set(parents) <= set(graph) for name, parents in graph.items()):
        return None
    whole = {name: parents or [] for name, parents in graph.items()}
    return whole if len(ordered(whole)) == len(whole) else None


def ordered(graph: Graph) -> list[str]:
    """Tasks, parents first; those on or behind a cycle are missing."""
    done: list[str] = []
    while ready := [name for name in graph if name not in done and all(parent in done for parent in graph[name])]:
        done += ready
    return done


def success_probability(graph: Graph, success: Mapping[str, tuple[float, float]], output: str) -> float:
    """Probability that the output task succeeds: the joint distribution of all outcomes, summed.

    Source: Opus (arXiv 2511.04220), reconstructed: a task succeeds with probability p when all its parents did, else q.

    Args:
        graph: task -> parents, without cycles.
        success: task -> (p, q).
        output: the task that counts.
    """
    needed, waiting = {output}, [output]
    while waiting:
        fresh = [parent for parent in graph[waiting.pop()] if parent not in needed]
        needed.update(fresh)
        waiting += fresh
    order = [name for name in ordered(graph) if name in needed]
    total = 0.0
    for outcome in itertools.product((True, False), repeat=len(order)):
        done = dict(zip(order, outcome, strict=True))
        if not done[output]:
            continue
        joint = 1.0
        for name in order:
            p = success[name][0 if all(done[parent] for parent in graph[name]) else 1]
            joint *= p if done[name] else 1 - p
        total += joint
    return total


def coupling(graph: Graph) -> float:
    """Share of the possible edges of an acyclic graph that are used; 0 for fewer than two tasks."""
    possible = len(graph) * (len(graph) - 1) / 2
    return sum(len(set(parents)) for parents in graph.values()) / possible if possible else 0.0


def workflow_value(
    p_output: float,
    cost: float,
    penalties: Mapping[str, float],
    gain: float = 1.0,
    cost_weight: float = 1.0,
    penalty_weight: float = 0.0,
) -> float:
    """gain * P(output) - cost_weight * cost - penalty_weight * sum of the penalties. Source: Opus (arXiv 2511.04220)."""
    return gain * p_output - cost_weight * cost - penalty_weight * math.fsum(penalties.values())
