"""Refuse losses whose parts contradict each other: ratio, bounds, surrogate, weights, aggregate, optimiser steps. No torch."""

from __future__ import annotations

from april.algorithms.facts import RunFacts, refuse
from april.algorithms.spec import AlgorithmConfig


def check_loss(config: AlgorithmConfig, run: RunFacts) -> None:
    """Raise for the first contradiction.

    Raises:
        RecipeError: names the two keys that disagree and what to change.
    """
    _check_bounds(config)
    _check_ratio(config)
    _check_steps(config, run)
    _check_corrections(config, run)


def _check_ratio(config: AlgorithmConfig) -> None:
    surrogate, ratio = config.surrogate, config.ratio
    use, anchor = getattr(surrogate, "ratio_use", "differentiated"), getattr(ratio, "anchor", "proximal")
    if use == "unused" and (ratio.type != "token" or anchor != "proximal"):
        refuse(
            f"a ratio has no effect on the surrogate {surrogate.type!r}",
            "algorithm.ratio", "algorithm.surrogate", got=f"{ratio.type} over {anchor}",
            hint="set algorithm.ratio = { type = 'token', anchor = 'proximal' } or another surrogate",
        )  # fmt: skip
    if use != "differentiated" and getattr(ratio, "gradient", "token") != "token":
        refuse(
            f"the ratio gives the surrogate {surrogate.type!r} no gradient",
            "algorithm.ratio.gradient", "algorithm.surrogate", got=getattr(ratio, "gradient", None), hint="leave gradient out",
        )  # fmt: skip
    if getattr(surrogate, "product_of_sample", False) and getattr(ratio, "reduce", None) != "sum":
        refuse(
            f"the surrogate {surrogate.type!r} is a window around the product of a sample's ratios",
            "algorithm.ratio", "algorithm.surrogate", got=f"{ratio.type} {getattr(ratio, 'reduce', '')}".strip(),
            hint="set algorithm.ratio = { type = 'sequence', reduce = 'sum', anchor = 'behaviour' }",
        )  # fmt: skip
    whole = (use == "differentiated" and getattr(ratio, "whole_samples", False)) or getattr(surrogate, "whole_samples", False)
    if whole and not getattr(config.aggregate, "whole_samples", True):
        what = "algorithm.ratio" if getattr(ratio, "whole_samples", False) else "algorithm.surrogate"
        refuse(
            "a ratio of whole samples counts each sample once for every token under this aggregate",
            what, "algorithm.aggregate", got=f"{ratio.type}, {surrogate.type}, {config.aggregate.type}",
            hint="use algorithm.aggregate = 'sequence_mean'",
        )  # fmt: skip
    if surrogate.type == "none" and not (config.objectives or config.penalties):
        refuse(
            "nothing trains the policy", "algorithm.surrogate", "algorithm.objectives", got="surrogate none, no objectives",
            hint="add an objective such as algorithm.objectives.dpo = {}, or use algorithm.surrogate = 'clip'",
        )  # fmt: skip
    if surrogate.type == "none" and config.weights:
        refuse(
            "weights have no effect without a policy loss",
            "algorithm.weights", "algorithm.surrogate", got=sorted(config.weights),
            hint="take the weights away, or use another surrogate",
        )  # fmt: skip


def key_of_steps(config: AlgorithmConfig, run: RunFacts) -> str | None:
    """The key that asks for more than one optimiser step on the same batch."""
    if "proximal" in config.update.needs:
        return "algorithm.update"
    for fact in ("num_optimizer_steps", "num_epochs"):
        if getattr(run, fact) > 1:
            return run.key(fact)
    return None


def _check_steps(config: AlgorithmConfig, run: RunFacts) -> None:
    several = key_of_steps(config, run)
    if several is not None and config.surrogate.type == "plain":
        refuse(
            "the plain policy gradient ignores that later optimiser steps are off-policy",
            "algorithm.surrogate", several, got=f"plain, {several}",
            hint="use algorithm.surrogate = 'clip' or one optimiser step a batch",
        )  # fmt: skip
    if run.num_epochs > 1 and getattr(config.update, "own_epochs", False):
        refuse(
            f"the update {config.update.type!r} decides by itself on the number of passes",
            "algorithm.update", run.key("num_epochs"), got=run.num_epochs, hint=f"set {run.key('num_epochs')} = 1",
        )  # fmt: skip


def _check_bounds(config: AlgorithmConfig) -> None:
    use, bounds = getattr(config.surrogate, "bounds_use", "optional"), config.bounds
    if use == "unused" and bounds is not None:
        refuse(
            f"bounds have no effect on the surrogate {config.surrogate.type!r}",
            "algorithm.bounds", "algorithm.surrogate", got=bounds.type, hint="set algorithm.bounds = false",
        )  # fmt: skip
    dual = getattr(config.surrogate, "dual_clip", None)
    if use == "needed" and bounds is None and (dual is None or config.surrogate.type != "clip"):
        refuse(
            f"the surrogate {config.surrogate.type!r} has no bounds",
            "algorithm.surrogate", "algorithm.bounds", got="bounds = false", hint="set algorithm.bounds = { type = 'constant' }",
        )  # fmt: skip
    own, anchor = getattr(bounds, "anchor", None), getattr(config.ratio, "anchor", "proximal")
    if own is not None and own != anchor:
        refuse(
            "the bounds belong to a ratio over another policy",
            "algorithm.bounds", "algorithm.ratio.anchor", got=f"{own}, {anchor}", hint=f"set algorithm.ratio.anchor = {own!r}",
        )  # fmt: skip


def _check_corrections(config: AlgorithmConfig, run: RunFacts) -> None:
    """Stale tokens are corrected, and only once."""
    ratio_counts = getattr(config.surrogate, "ratio_use", "differentiated") != "unused"
    over_behaviour = ratio_counts and config.ratio.corrects
    corrected = config.surrogate.type == "none" or over_behaviour or config.surrogate.corrects
    if run.stale_tokens and not corrected and not any(atom.corrects for atom in config.weights.values()):
        refuse(
            "tokens of older versions are trained on without a correction",
            "algorithm.weights", run.key("stale_tokens"), got=sorted(config.weights) or "no weights",
            expected="a weight that corrects for old behaviour",
            hint="add algorithm.weights.tis = { cap = 2.0 }, allow no lag, or say that it is on purpose with "
            "algorithm.weights.uncorrected = {}",
        )  # fmt: skip
    twice = [name for name, atom in config.weights.items() if getattr(atom, "reweighs", False)]
    if over_behaviour and twice:
        refuse(
            "old behaviour is corrected twice: by the ratio and by a weight",
            "algorithm.ratio.anchor", f"algorithm.weights.{twice[0]}", got="anchor behaviour, and a weight from it to proximal",
            hint=f"set algorithm.ratio.anchor = 'proximal', or algorithm.weights.{twice[0]} = false",
        )  # fmt: skip
    if run.stale_tokens and getattr(config.surrogate, "fades", False) and not over_behaviour and twice:
        refuse(
            f"the surrogate {config.surrogate.type!r} fades with the distance from the ratio's anchor: over the proximal policy "
            "it overlooks how stale a token is, which a weight does not make up for",
            "algorithm.surrogate", f"algorithm.weights.{twice[0]}", got=f"{config.surrogate.type}, {twice[0]}, stale tokens",
            hint=f"set algorithm.ratio.anchor = 'behaviour' and algorithm.weights.{twice[0]} = false",
        )  # fmt: skip
    idle = [name for name, atom in config.weights.items() if {"proximal", "behaviour"} <= atom.needs]
    if run.interpolates and not run.stale_tokens and idle:
        refuse(
            "the interpolated proximal policy of fresh tokens is the one that sampled them: nothing is to correct",
            f"algorithm.weights.{idle[0]}", run.key("interpolates"), got="interpolate, and no stale tokens",
            hint=f"set {run.key('interpolates')} = 'recompute', or algorithm.weights.{idle[0]} = false",
        )  # fmt: skip
    against = [name for name, atom in config.weights.items() if atom.type == "uncorrected"]
    others = [name for name, atom in config.weights.items() if atom.corrects and name not in against]
    if against and (others or over_behaviour):
        refuse(
            "stale tokens are called uncorrected and are corrected",
            f"algorithm.weights.{against[0]}", f"algorithm.weights.{others[0]}" if others else "algorithm.ratio.anchor",
            got=others or "anchor behaviour", hint=f"take one away, such as algorithm.weights.{against[0]} = false",
        )  # fmt: skip
