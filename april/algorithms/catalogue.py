"""What there is: every atom and preset with its source, and where the methods live that are no atoms. No torch.

`april list algorithm` prints it, docs/reference/algorithms.md shows it, and tests compare it with the golden cases.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from april.algorithms.atoms import SLOTS, Atom, Info, role_of
from april.algorithms.check import ALWAYS
from april.algorithms.spec import AlgorithmConfig
from april.config.load import find_recipe, read_preset, recipe_names

PRESETS = "algorithm"
"""Folder of the presets among April's recipes."""
CERTAINTIES = {
    "A": "gives the numbers of a public implementation",
    "B": "read in released code, or in several descriptions that agree",
    "C": "reconstructed from an abstract",
}


class Method(NamedTuple):
    """An atom.

    Attributes:
        slot, name: where and how a recipe names it.
        summary: first line of its description.
        info: source, formula, certainty, golden cases; None for those of plug-ins.
        defaults: option -> default; "required" where there is none.
        reads: columns that it reads with these defaults.
        presets: that have it.
    """

    slot: str
    name: str
    summary: str
    info: Info | None
    defaults: dict[str, Any]
    reads: tuple[str, ...]
    presets: tuple[str, ...]


class Preset(NamedTuple):
    """A preset.

    Attributes:
        name: value of `algorithm.preset`.
        summary: first sentence of its file, with its source.
        own: its atoms that the preset grpo does not have, or not with these options, as "slot type".
        wants: columns that not every run has: a reference, entropies, named parts of the reward, numbers of items.
        golden: cases of its own atoms.
    """

    name: str
    summary: str
    own: tuple[str, ...]
    wants: tuple[str, ...]
    golden: tuple[str, ...]


class Elsewhere(NamedTuple):
    """A method of an algorithm that is not an atom.

    Attributes:
        name: method and what of it.
        paper: its source.
        where: key of a recipe, or function; "formula only" of one that nothing calls, for an allocator of one's own.
        certainty: as in `Info`.
        golden: its cases.
    """

    name: str
    paper: str
    where: str
    certainty: str
    golden: tuple[str, ...] = ()


class Outside(NamedTuple):
    """A method that this package does not have, with the reason; and its golden cases, which nothing runs."""

    name: str
    paper: str
    reason: str
    golden: tuple[str, ...]


ELSEWHERE = (
    Elsewhere(
        "the whole chain: advantage, correction, surrogate, penalty, aggregate", "-",
        "`april.algorithms.losses.compose.policy_loss`", "A",
        golden=("pipeline_grpo_cliphigher_tis_kl", "on_policy_gradient_identity"),
    ),
    Elsewhere(
        "AReaL: a proximal policy between behaviour and current", "arXiv 2505.24298",
        '`training.proximal` = "interpolate"', "A", golden=("proximal_loglinear_approximation",),
    ),
    Elsewhere("PPO, T-PPO: value model with an optimiser and a warm-up of its own", "arXiv 1707.06347", "`training.value`", "B"),
    Elsewhere("R3: the trainer uses the experts that the engine used", "arXiv 2510.11370",
              "`engine.record_routes`, `training.replay_routes`", "B", ("r3_replayed_gates",)),
    Elsewhere("HAPO: temperature by entropy", "arXiv 2509.16591", "`sampling.adaptive_temperature`", "B",
              ("hapo_adaptive_temperature",)),
    Elsewhere("QeRL: noise on the sampler's weights", "arXiv 2510.11696", "`engine.noise`", "A", ("qerl_noise_schedule",)),
    Elsewhere("AEPO: rollouts from the prompt or from tool calls", "arXiv 2510.14545",
              "formula only: `april.selection.allocation.whole_rollouts`", "B", ("aepo_rollout_budget",)),
    Elsewhere("ETTRL: cost of forking at uncertain tokens", "arXiv 2508.11356",
              "formula only: `april.selection.allocation.fork_cost`", "B", ("ettrl_fork_token_ratio",)),
    Elsewhere("XRPO: which prompt is worth another rollout", "arXiv 2510.06672",
              "formula only: `april.selection.allocation.uncertainty_gain`", "B", ("xrpo_allocator",)),
    Elsewhere("JET: where a response is cut and answered", "arXiv 2509.23392",
              "formula only: `april.selection.allocation.cut_points`", "B", ("jet_truncation_points",)),
    Elsewhere("FAPO: training the judge that finds flaws", "arXiv 2510.22543", 'reward "error_step"', "B",
              ("fapo_genrm_process_reward",)),
    Elsewhere("FAPO: asking the judge about right answers", "arXiv 2510.22543", 'reward "flaw_check"', "B"),
    Elsewhere("GRPO-RoC: counting slips of tools and format", "arXiv 2508.20722", 'reward "tool_trace"', "A"),
    Elsewhere("MASA: reading a prediction of pass rate and length", "arXiv 2510.03259", 'reward "meta_prediction"', "A"),
    Elsewhere("ACECode, Afterburner: running programs on tests", "arXiv 2412.17264, 2505.23387", 'reward "program"', "B"),
    Elsewhere("ReEx-SQL: running queries", "arXiv 2505.12768", 'reward "sql"', "C"),
    Elsewhere("EconProver: telling reasoned answers from direct ones", "arXiv 2509.12603", 'reward "patterns"', "C"),
    Elsewhere("MASA: ending rollouts that run far beyond right ones", "arXiv 2510.03259", 'watch "early_cut"', "B"),
    Elsewhere("HBPO: token budgets by subgroup", "arXiv 2507.15844", 'watch "length_budgets"', "B"),
    Elsewhere("Opus: expected reward of a workflow", "seed 159 of the method sheets", 'reward "workflow"', "C",
              ("opus_expected_reward",)),
    Elsewhere("ReMax: greedy answers beside the sampled ones", "arXiv 2310.10505", "`batch.greedy_members`", "B"),
    Elsewhere("PVPO: measuring the anchor", "arXiv 2508.21104", "`april.run.anchors.measure_baselines`", "B"),
    Elsewhere("T-PPO: windows of tokens", "arXiv 2506.15050", 'schedule "truncated"', "B"),
)  # fmt: skip
OUTSIDE = (
    Outside("SAC Flow", "arXiv 2509.25756", "continuous control: a flow policy whose actions are vectors and not tokens, trained "
            "with soft actor-critic on replayed transitions", ("sac_flow_gated_step",)),
    Outside("A2PR", "arXiv 2405.19909", "continuous control: an offline actor-critic with a variational autoencoder of actions "
            "that are vectors", ("a2pr_target_action",)),
    Outside("SERA", "arXiv 2310.19805", "continuous control: a bonus for transitions between states with distances, weighed by Q "
            "functions", ("sera_q_conditioned_intrinsic",)),
)  # fmt: skip


def methods() -> list[Method]:
    """All registered atoms, slot by slot."""
    having = _presets_by_atom()
    return [
        _method(slot, name, entry.config, tuple(having.get((slot, name), ())))
        for slot, atoms in SLOTS.items()
        for name, entry in sorted(atoms.items())
    ]


def _method(slot: str, name: str, config: type[Atom], having: tuple[str, ...]) -> Method:
    defaults = {
        key: "required" if field.is_required() else field.get_default(call_default_factory=True)
        for key, field in config.model_fields.items()
        if key != "type"
    }
    try:
        reads = config.model_construct().needs  # type: ignore[call-arg]
    except AttributeError:  # an option that has no default says what it reads
        reads = config.requires
    summary = (config.__doc__ or "").strip().splitlines()[0]
    return Method(slot, name, summary, config.info, defaults, tuple(sorted(reads)), having)


def presets() -> list[Preset]:
    """All presets."""
    known = {name: AlgorithmConfig.model_validate(read_preset(name)[0]) for name in recipe_names(PRESETS)}
    usual = list(_atoms(known["grpo"]))
    out = []
    for name, config in known.items():
        own = [pair for pair in _atoms(config) if pair not in usual]
        golden = dict.fromkeys(case for _, atom in own for case in (atom.info.golden if atom.info is not None else ()))
        wants = sorted(config.requires - ALWAYS - _given(config))
        labels = tuple(dict.fromkeys(f"{slot} {atom.type}" for slot, atom in own))
        out.append(Preset(name, first_sentence(_file(name)), labels, tuple(wants), tuple(golden)))
    return out


def _given(config: AlgorithmConfig) -> set[str]:
    """Columns that the algorithm brings itself."""
    made = {column for _, atom in config.atoms() for column in atom.makes}
    trained = any(role_of(atom) == "value" for atom in config.objectives.values())
    return made | {"advantage"} | ({"value"} if trained else set())


def _atoms(config: AlgorithmConfig) -> Iterator[tuple[str, Atom]]:
    for path, atom in config.atoms():
        yield re.split(r"[.\[]", path)[0], atom


def _presets_by_atom() -> dict[tuple[str, str], list[str]]:
    having: dict[tuple[str, str], list[str]] = {}
    for name in recipe_names(PRESETS):
        found = _atoms(AlgorithmConfig.model_validate(read_preset(name)[0]))
        for pair in dict.fromkeys((slot, atom.type) for slot, atom in found):
            having.setdefault(pair, []).append(name)
    return having


def _file(preset: str) -> Path:
    return find_recipe(preset, folder=PRESETS)


def first_sentence(recipe: Path) -> str:
    """The first sentence of the comment with which a recipe begins."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), recipe.read_text(encoding="utf-8").splitlines())
    return re.split(r"(?<!et al)\.(?:\s|$)", " ".join(line.lstrip("# ") for line in lines))[0]


def shortened(names: Iterable[str], limit: int = 6) -> str:
    """Names with commas; of many only the first, "grpo" before all."""
    ordered = sorted(names, key=lambda name: (name != "grpo", name))
    if len(ordered) <= limit + 1:
        return ", ".join(ordered)
    return f"{', '.join(ordered[:2])} and {len(ordered) - 2} others"
