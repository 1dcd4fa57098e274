"""How long responses are, how hard prompts are, and how long tools take: by address, the same under every schedule.

    z[p, m] = sqrt(rho) z[p] + sqrt(1 - rho) z[p, m]          standard normal; prompts differ, their samples less so
    length  = quantile of the distribution at Phi(z), cut at the cap

The group effect is that of the long-tail measurements (Seer, arXiv 2511.14617, figure 4). Every draw belongs to (seed, epoch,
prompt, member), so a sample is as long in one schedule as in any other.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from april.config.schema import Config
from april.core.errors import DataError
from april.core.prompt import Prompt
from april.core.random import stream_key, uniforms
from april.core.sample import Sample, repeated
from april.engines.simulated.course import Course
from april.simulate.recorded import Recorded, read_lengths

Floats = npt.NDArray[np.float64]
_ONE_TOKEN = np.zeros(1, np.int32)


class Tools(Config):
    """Tool calls inside a response: a geometric number of turns, log-normal latencies."""

    mean_turns: float = Field(3.0, ge=1, description="turns of a response; between two of them a tool is called")
    max_turns: int = Field(64, ge=1, description="more are cut")
    mean_s: float = Field(0.3, ge=0, description="mean latency of a call")
    cv: float = Field(1.0, ge=0, description="standard deviation of a latency over its mean")
    max_s: float = Field(300.0, gt=0, description="a call that takes longer times out here")


class Workload(Config):
    """Lengths, prompts and difficulty."""

    lengths: Literal["lognormal", "fixed", "pareto", "recorded"] = Field("lognormal", description="shape of the distribution")
    mean_tokens: float = Field(8000, gt=0, description="mean response; not for recorded lengths")
    mean_is: Literal["after_cut", "before_cut"] = Field("after_cut", description="whether the mean counts responses as cut")
    sigma: float = Field(0.7, ge=0, description="lognormal: standard deviation of the logarithm")
    shape: float = Field(1.5, gt=1, description="pareto: exponent of the tail")
    rho: float = Field(0.7, ge=0, le=1, description="share of the variance that all samples of a prompt have in common")
    max_tokens: int = Field(16384, ge=1, description="cap of a response")
    loop_fraction: float = Field(
        0.0, ge=0, le=1, description="share of responses that run to the cap whatever their length: loops"
    )
    growth_per_epoch: float = Field(0.0, gt=-1, description="lengths change by this factor - 1 from one epoch to the next")
    prompt_tokens: int = Field(200, ge=1, description="length of each prompt")
    num_prompts: int = Field(4096, ge=1, description="size of the data set")
    path: str | None = Field(None, description="recorded: a run's folder, its lengths.jsonl, or CSVs with GeneratedTokens")
    difficulty_by_length: float = Field(0.7, ge=0, le=1, description="how far prompts with long answers are the hard ones")
    solved_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the prompts that are always answered right: the easiest"
    )
    tools: Tools | None = Field(None, description="tool calls; none when left out")

    @model_validator(mode="after")
    def _consistent(self) -> Workload:
        if (self.lengths == "recorded") != (self.path is not None):
            raise ValueError("path and lengths = 'recorded' belong together")
        if self.lengths in ("lognormal", "pareto") and self.mean_is == "after_cut" and self.mean_tokens >= self.max_tokens:
            raise ValueError("a mean after the cut is smaller than the cap")
        return self


class Lengths:
    """The draws of a workload.

    Args:
        group_size: samples of each prompt.
        folder: where relative paths of recordings start.
    """

    def __init__(self, workload: Workload, seed: int, group_size: int, folder: Path | None = None) -> None:
        self.workload, self.seed, self.group_size = workload, seed, group_size
        self.recorded: Recorded | None = None
        if workload.path is not None:
            self.recorded = read_lengths(workload.path, folder)
        self._scale = 1.0
        if workload.lengths in ("lognormal", "pareto") and workload.mean_is == "after_cut":
            self._scale = _scale_to_mean(workload)
        self._tokens = lru_cache(maxsize=4)(self._epoch_tokens)
        self._successes = lru_cache(maxsize=4)(self._epoch_successes)

    @property
    def mean_tokens(self) -> float:
        """Mean length over the data set, in the first epoch."""
        if self.recorded is not None and self.recorded.by_sample:
            return float(self.recorded.sorted_tokens.mean())
        return float(self._tokens(0).mean())

    def prompts(self) -> list[Prompt]:
        """The data set; a recording's own prompts in the order of their first appearance, if it names them."""
        return self._prompts

    @cached_property
    def _prompts(self) -> list[Prompt]:
        if self.recorded is not None and self.recorded.prompts:
            named = self.recorded.prompts.items()
            return [Prompt(name, repeated(_ONE_TOKEN, tokens), item={"index": i}) for i, (name, tokens) in enumerate(named)]
        return [
            Prompt(f"p{index}", repeated(_ONE_TOKEN, tokens), item={"index": index})
            for index, tokens in enumerate(self._prompt_tokens())
        ]

    def _prompt_tokens(self) -> list[int]:
        """Length of each prompt without a name: drawn from recorded ones, else all the same."""
        num = self.workload.num_prompts
        if self.recorded is None or not len(self.recorded.sorted_contexts):
            return [self.workload.prompt_tokens] * num
        places = uniforms(np.full(num, stream_key(self.seed, "context"), np.uint64), np.arange(num))
        contexts = self.recorded.sorted_contexts
        return [int(contexts[int(place * len(contexts))]) for place in places]

    def tokens(self, sample: Sample) -> int:
        """Length of a sample's response."""
        epoch, name, member = sample.id.epoch, sample.id.prompt, sample.id.member
        if self.recorded is not None and (known := self.recorded.of(epoch, name, member)) is not None:
            return known
        row = self._tokens(epoch)
        return int(row[int(sample.prompt.item["index"]), member % row.shape[1]])

    def course(self, sample: Sample) -> Course:
        """What the engine needs to know."""
        tokens, tools = self.tokens(sample), self.workload.tools
        cut = tokens >= self.workload.max_tokens
        pauses = () if tools is None else self._pauses(sample, tokens, tools)
        return Course(tokens, "length" if cut else "eos", pauses)

    def success(self, sample: Sample) -> bool:
        """Whether a sample is right: the prompt's chance is Beta(1/2, 1/2), which is sin^2 of a uniform angle."""
        row = self._successes(sample.id.epoch)
        return bool(row[int(sample.prompt.item["index"]), sample.id.member % row.shape[1]])

    def _epoch_successes(self, epoch: int) -> npt.NDArray[np.bool_]:
        """Which samples of an epoch are right, bool (P, G)."""
        size = self._num_prompts() * self.group_size
        draws = uniforms(np.full(size, stream_key(self.seed, "success", epoch), np.uint64), np.arange(size))
        return draws.reshape(-1, self.group_size) < self.chances[:, None]

    @cached_property
    def chances(self) -> Floats:
        """Chance of success of each prompt (P,)."""
        weight = self.workload.difficulty_by_length
        own = self._normal(0, "difficulty", 1)[:, 0]
        mixed = -weight * self._normal(0, "prompt", 1)[:, 0] + math.sqrt(1 - weight * weight) * own
        place = np.minimum(1.0, _phi(mixed) / (1 - self.workload.solved_fraction))
        return np.asarray(np.sin(place * np.pi / 2) ** 2)

    # -- draws --------------------------------------------------------------------------------------------------------

    def _num_prompts(self) -> int:
        return len(self.recorded.prompts) if self.recorded is not None and self.recorded.prompts else self.workload.num_prompts

    def _normal(self, epoch: int, what: str, columns: int) -> Floats:
        """Standard normals (P, columns) at an address (Box and Muller, 1958)."""
        size = self._num_prompts() * columns
        keys = [stream_key(self.seed, what, epoch, part) for part in ("radius", "angle")]
        radius, angle = (uniforms(np.full(size, key, np.uint64), np.arange(size)) for key in keys)
        return np.asarray(np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)).reshape(-1, columns)

    def _epoch_tokens(self, epoch: int) -> npt.NDArray[np.int32]:
        """Lengths of all samples of an epoch, int32 (P, G)."""
        load = self.workload
        z = math.sqrt(load.rho) * self._normal(0, "prompt", 1) + math.sqrt(1 - load.rho) * self._normal(
            epoch, "sample", self.group_size
        )
        lengths = self._quantile(z) * (1 + load.growth_per_epoch) ** epoch
        if load.loop_fraction:
            keys = np.full(z.size, stream_key(self.seed, "loop", epoch), np.uint64)
            loops = uniforms(keys, np.arange(z.size)).reshape(z.shape) < load.loop_fraction
            lengths = np.where(loops, load.max_tokens, lengths)
        return np.clip(np.rint(lengths), 1, load.max_tokens).astype(np.int32)

    def _quantile(self, z: Floats) -> Floats:
        load = self.workload
        match load.lengths:
            case "fixed":
                return np.full(z.shape, load.mean_tokens)
            case "recorded" if self.recorded is not None:
                return np.asarray(np.quantile(self.recorded.sorted_tokens, _phi(z)))
            case "pareto":
                return np.asarray(self._scale * _pareto_unit(load) * np.power(1 - _phi(z), -1 / load.shape))
            case _:
                return np.asarray(self._scale * load.mean_tokens * np.exp(load.sigma * z - load.sigma**2 / 2))

    def _pauses(self, sample: Sample, tokens: int, tools: Tools) -> tuple[tuple[int, float], ...]:
        """Tool calls at even distances along the response."""
        key = stream_key(self.seed, "tools", sample.id.epoch, sample.id.prompt, sample.id.member)
        draws = uniforms(np.full(2 * tools.max_turns + 1, key, np.uint64), np.arange(2 * tools.max_turns + 1))
        stay = 1 - 1 / tools.mean_turns
        turns = 1 if stay <= 0 else min(tools.max_turns, 1 + int(math.log(1 - draws[0]) / math.log(stay)))
        turns = min(turns, tokens)
        sigma = math.sqrt(math.log(1 + tools.cv**2))
        normal = NormalDist()
        out = []
        for turn in range(1, turns):
            z = normal.inv_cdf(min(1 - 1e-12, max(1e-12, float(draws[turn]))))
            out.append((turn * tokens // turns, min(tools.max_s, tools.mean_s * math.exp(sigma * z - sigma * sigma / 2))))
        return tuple(out)


def _pareto_unit(workload: Workload) -> float:
    """Smallest value of a Pareto variable with the workload's mean."""
    return workload.mean_tokens * (workload.shape - 1) / workload.shape


def mean_after_cut(workload: Workload, scale: float) -> float:
    """Mean of min(length, cap) when lengths are multiplied by `scale`; loops are not counted."""
    cap = workload.max_tokens
    if workload.lengths == "pareto":
        low, shape = scale * _pareto_unit(workload), workload.shape
        return cap if low >= cap else low * (shape - (low / cap) ** (shape - 1)) / (shape - 1)
    mean, sigma = scale * workload.mean_tokens, workload.sigma
    if sigma == 0:
        return min(mean, cap)
    place = (math.log(cap / mean) + sigma * sigma / 2) / sigma
    cdf = NormalDist().cdf
    return mean * cdf(place - sigma) + cap * (1 - cdf(place))


def _scale_to_mean(workload: Workload) -> float:
    """The factor on all lengths that makes their mean after the cut what was asked for, by bisection."""
    low, high = 1e-3, 1e6
    if mean_after_cut(workload, high) < workload.mean_tokens:
        raise DataError("a mean length cannot be reached", where="workload.mean_tokens", got=workload.mean_tokens)
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_after_cut(workload, middle) < workload.mean_tokens else (low, middle)
    return high


def _phi(z: Floats) -> Floats:
    """The normal distribution function: a rational approximation of erf, absolute error below 1.5e-7.

    Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 7.1.26.
    """
    x = np.abs(z) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * x)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = 1 - series * np.exp(-x * x)
    return np.asarray(np.clip(0.5 * (1 + np.sign(z) * erf), 0.0, 1 - 1e-9))
