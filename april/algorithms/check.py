"""Refuse algorithms that cannot work in the run they are meant for; each message names both keys. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from april.algorithms.atoms import OPEN_COLUMNS
from april.algorithms.spec import AlgorithmConfig
from april.core.errors import RecipeError

GROUP_ESTIMATORS = frozenset(
    {"group", "leave_one_out", "optimal_baseline", "maximum_likelihood", "pass_at_k", "decoupled", "rubric", "token_weighted",
     "polychromic", "anchored", "same_step", "tree_subgroups", "tree_gain", "tree_depthwise", "tree_inter_intra"}
)  # fmt: skip
ALWAYS = frozenset(
    {"token_ids", "mask", "trained", "behaviour", "temperature", "lag", "reward", "advantage", "proximal", "correct", "finished",
     "current", "current_entropy", "value", "return", "turn", "anchor", "step"}
)
STALE_CORRECTIONS = "behaviour"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run says about its data, with the recipe keys that say it.

    Attributes:
        group_size: samples of each prompt.
        stale_tokens: whether tokens of older versions can reach the learner.
        has_reference: whether there is a reference policy.
        records_entropy: whether the engine records entropies.
        temperature, top_p, top_k: of the training rollouts.
        max_new_tokens: response budget, or None when it varies.
        num_optimizer_steps: optimiser steps on each batch.
        keys: recipe path of each of the above, for messages.
    """

    group_size: int
    stale_tokens: bool = False
    has_reference: bool = False
    records_entropy: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    num_optimizer_steps: int = 1
    keys: tuple[tuple[str, str], ...] = (
        ("group_size", "batch.group_size"),
        ("stale_tokens", "schedule.max_lag_steps"),
        ("has_reference", "model.reference"),
        ("records_entropy", "sampling.entropy"),
        ("temperature", "sampling.temperature"),
        ("top_p", "sampling.top_p"),
        ("top_k", "sampling.top_k"),
        ("max_new_tokens", "sampling.max_new_tokens"),
        ("num_optimizer_steps", "training.num_optimizer_steps"),
    )

    def key(self, fact: str) -> str:
        """The recipe path that sets a fact."""
        return dict(self.keys).get(fact, fact)


def check(config: AlgorithmConfig, run: RunFacts) -> None:
    """Raise for the first thing that cannot work.

    Raises:
        RecipeError: names the two keys that disagree and what to change.
    """
    _check_sampling(run)
    _check_columns(config, run)
    _check_credit(config, run)
    _check_bounds(config)
    _check_ratio(config, run)
    _check_corrections(config, run)
    _check_lengths(config, run)


def _refuse(what: str, *keys: str, got: object, hint: str, expected: str | None = None) -> None:
    raise RecipeError(what, where=", ".join(keys), got=got, expected=expected, hint=hint)


def _check_sampling(run: RunFacts) -> None:
    if run.temperature <= 0:
        _refuse(
            "greedy samples cannot be trained on: their log-prob is 0 whatever the policy",
            run.key("temperature"), "algorithm", got=run.temperature, hint="use a temperature above 0 for training",
        )  # fmt: skip
    if run.top_p < 1 or run.top_k > 0:
        _refuse(
            "training on truncated sampling is refused unless the kept set is stored",
            run.key("top_p"), run.key("top_k"), got=f"top_p {run.top_p}, top_k {run.top_k}", hint="set top_p = 1 and top_k = 0",
            expected="samples of the whole distribution",
        )  # fmt: skip


def _check_columns(config: AlgorithmConfig, run: RunFacts) -> None:
    there = ALWAYS | ({"reference"} if run.has_reference else set()) | ({"entropy"} if run.records_entropy else set())
    there |= {column for _, atom in config.atoms() for column in atom.provides}
    provider = {"reference": "has_reference", "entropy": "records_entropy"}
    for path, atom in config.atoms():
        for column in sorted(name for name in atom.needs - there if not name.startswith(OPEN_COLUMNS)):
            key = run.key(provider.get(column, column))
            _refuse(
                f"{atom.type!r} needs the column {column!r}, which nothing provides",
                f"algorithm.{path}", key, got=f"no {column}", hint=f"set {key}, or take algorithm.{path} away",
            )  # fmt: skip


def _check_credit(config: AlgorithmConfig, run: RunFacts) -> None:
    if config.advantage.type in GROUP_ESTIMATORS and run.group_size < 2:
        _refuse(
            "a group estimator compares siblings, and there are none",
            "algorithm.advantage", run.key("group_size"), got=f"{config.advantage.type}, {run.group_size} sample a prompt",
            expected="2 samples a prompt or more", hint=f"set {run.key('group_size')} to 2 or more",
        )  # fmt: skip


def _check_ratio(config: AlgorithmConfig, run: RunFacts) -> None:
    surrogate, aggregate = config.surrogate.type, config.aggregate.type
    if surrogate == "plain":
        if config.ratio.type != "token":
            _refuse(
                "a ratio has no effect on the plain policy gradient",
                "algorithm.ratio", "algorithm.surrogate", got=config.ratio.type,
                hint="set algorithm.ratio = 'token' or another surrogate",
            )  # fmt: skip
        if run.num_optimizer_steps > 1:
            _refuse(
                "the plain policy gradient ignores that later optimiser steps are off-policy",
                "algorithm.surrogate", run.key("num_optimizer_steps"), got=run.num_optimizer_steps,
                hint="use algorithm.surrogate = 'clip' or one optimiser step a batch",
            )  # fmt: skip
    if config.ratio.type == "sequence" and surrogate != "vespo" and aggregate not in ("sequence_mean", "sequence_sum"):
        _refuse(
            "a ratio of whole samples counts each sample once for every token under this aggregate",
            "algorithm.ratio", "algorithm.aggregate", got=f"sequence, {aggregate}",
            hint="use algorithm.aggregate = 'sequence_mean'",
        )  # fmt: skip


def _check_bounds(config: AlgorithmConfig) -> None:
    use = getattr(config.surrogate, "bounds_use", "optional")
    if use == "unused" and config.bounds is not None:
        _refuse(
            f"bounds have no effect on the surrogate {config.surrogate.type!r}",
            "algorithm.bounds", "algorithm.surrogate", got=config.bounds.type, hint="set algorithm.bounds = false",
        )  # fmt: skip
    dual = getattr(config.surrogate, "dual_clip", None)
    if use == "needed" and config.bounds is None and (dual is None or config.surrogate.type != "clip"):
        _refuse(
            f"the surrogate {config.surrogate.type!r} has no bounds",
            "algorithm.surrogate", "algorithm.bounds", got="bounds = false", hint="set algorithm.bounds = { type = 'constant' }",
        )  # fmt: skip


def _check_corrections(config: AlgorithmConfig, run: RunFacts) -> None:
    corrected = config.surrogate.type == "none" or any(
        STALE_CORRECTIONS in atom.needs for atom in (config.ratio, config.surrogate, *config.weights.values())
    )
    if run.stale_tokens and not corrected:
        _refuse(
            "tokens of older versions are trained on without a correction",
            "algorithm.weights", run.key("stale_tokens"), got=sorted(config.weights) or "no weights",
            expected="a weight that corrects for old behaviour",
            hint="add algorithm.weights.tis = { cap = 2.0 }, or allow no lag",
        )  # fmt: skip


def _check_lengths(config: AlgorithmConfig, run: RunFacts) -> None:
    for index, atom in enumerate(config.reward):
        limit = getattr(atom, "max_tokens", None)
        if limit is not None and run.max_new_tokens is not None and limit - atom.buffer_tokens >= run.max_new_tokens:  # type: ignore[attr-defined]
            _refuse(
                "the length penalty starts beyond the longest response",
                f"algorithm.reward[{index}].max_tokens", run.key("max_new_tokens"), got=f"{limit}, {run.max_new_tokens}",
                hint=f"set max_tokens to {run.max_new_tokens}",
            )  # fmt: skip
