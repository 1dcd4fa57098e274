"""Refuse algorithms that cannot work in the run they are meant for; each message names both keys. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from april.algorithms.atoms import OPEN_COLUMNS, SLOTS, Atom, role_of
from april.algorithms.check_loss import check_loss, key_of_steps
from april.algorithms.facts import RunFacts, refuse
from april.algorithms.spec import AlgorithmConfig

__all__ = ["RunFacts", "check", "remarks"]

ALWAYS = frozenset(
    {"token_ids", "mask", "trained", "behaviour", "temperature", "lag", "reward", "proximal", "correct", "finished", "current",
     "current_entropy", "return", "turn", "anchor", "step"}
)  # fmt: skip
"""Columns that a trainer has or computes in any run."""
PROVIDERS = {
    "reference": "set model.reference",
    "entropy": "set sampling.entropy = true",
    "value": "add algorithm.objectives.value = {}",
    "baseline": "set batch.greedy_members = 1, or measure it beforehand (april.run.anchors) and read 'item.baseline'",
}
"""How a column that some runs lack comes to be there."""
READERS = {
    "reward": ("algorithm.advantage", "use an advantage that reads the reward, such as 'group'"),
    "token_reward": ("algorithm.advantage", "use an advantage that reads rewards of tokens, such as 'reward_to_go'"),
    "entropy_score": ("algorithm.surrogate", "use an atom that reads it, such as the surrogate 'hapo'"),
}
"""The key of what would read a column, and how it comes to."""


def check(config: AlgorithmConfig, run: RunFacts) -> None:
    """Raise for the first thing that cannot work.

    Raises:
        RecipeError: names the two keys that disagree and what to change.
    """
    _check_sampling(run)
    _check_columns(config, run)
    _check_unread(config)
    _check_groups(config, run)
    _check_queries(config, run)
    check_loss(config, run)
    _check_lengths(config, run)
    _check_idle_options(config)


def remarks(config: AlgorithmConfig, run: RunFacts) -> list[str]:
    """What a user may want to know of an algorithm that works."""
    one_step = key_of_steps(config, run) is None and not run.interpolates
    on_proximal = getattr(config.ratio, "anchor", "proximal") == "proximal"
    out = []
    if one_step and on_proximal and config.bounds is not None and config.surrogate.type != "none":
        out.append(
            "with one optimiser step a batch the ratio is 1 and algorithm.bounds never act; "
            f"{run.key('num_optimizer_steps')} = 2 or algorithm.ratio.anchor = 'behaviour' lets them"
        )
    for name, atom in config.penalties.items():
        if one_step and "proximal" in atom.needs and "reference" not in atom.needs:
            out.append(f"algorithm.penalties.{name} is 0 with one optimiser step a batch")
    return out


def _check_sampling(run: RunFacts) -> None:
    if run.temperature <= 0:
        refuse(
            "greedy samples cannot be trained on: their log-prob is 0 whatever the policy",
            run.key("temperature"), "algorithm", got=run.temperature, hint="use a temperature above 0 for training",
        )  # fmt: skip
    if run.top_p < 1 or run.top_k > 0:
        refuse(
            "training on truncated sampling is refused unless the kept set is stored",
            run.key("top_p"), run.key("top_k"), got=f"top_p {run.top_p}, top_k {run.top_k}", hint="set top_p = 1 and top_k = 0",
            expected="samples of the whole distribution",
        )  # fmt: skip


def _check_columns(config: AlgorithmConfig, run: RunFacts) -> None:
    """Every column is there when it is read: from the run, or from an atom before."""
    there = ALWAYS | ({"reference"} if run.has_reference else set()) | ({"entropy"} if run.records_entropy else set())
    there |= {"baseline"} if run.greedy_members else set()
    there |= {"value"} if any(role_of(atom) == "value" for atom in config.objectives.values()) else set()
    key = {"reference": run.key("has_reference"), "entropy": run.key("records_entropy"), "value": "algorithm.objectives"}
    key["baseline"] = run.key("greedy_members")
    for path, atom in config.atoms():
        for column in sorted(name for name in atom.needs - there if not name.startswith(OPEN_COLUMNS)):
            refuse(
                f"{atom.type!r} needs the column {column!r}, which nothing provides",
                f"algorithm.{path}", key.get(column, f"column {column!r}"), got=f"no {column}",
                hint=f"{_provider(column)}, or take algorithm.{path} away",
            )  # fmt: skip
        there |= atom.makes | ({"advantage"} if path == "advantage" else set())
    if run.greedy_members and "baseline" not in config.requires:
        refuse(
            "greedy members measure a baseline that no atom reads",
            run.key("greedy_members"), "algorithm.advantage", got=f"{run.greedy_members} a group",
            hint='set algorithm.advantage = { type = "reward_to_go", baseline = "baseline" }, or leave them out',
        )  # fmt: skip


def _check_unread(config: AlgorithmConfig) -> None:
    """What a reward transform, an adjust or a value model makes is read by an atom after it."""
    atoms = list(config.atoms())
    for index, (path, atom) in enumerate(atoms):
        read = frozenset().union(*(later.reads for _, later in atoms[index + 1 :]))
        made = atom.makes if path.startswith(("reward", "adjust")) else frozenset()
        for column in sorted(made - read):
            key, reader = READERS.get(column, (f"column {column!r}", "use an atom that reads it"))
            refuse(
                f"{atom.type!r} makes the column {column!r}, which nothing reads after it",
                f"algorithm.{path}", key, got=f"no atom that reads {column}", hint=f"{reader}, or take algorithm.{path} away",
            )  # fmt: skip
    trained = [name for name, atom in config.objectives.items() if role_of(atom) == "value"]
    if trained and not any("value" in atom.reads and role_of(atom) != "value" for _, atom in atoms):
        refuse(
            "a value model is trained whose values nothing reads",
            f"algorithm.objectives.{trained[0]}", "algorithm.advantage", got=config.advantage.type,
            hint=f"set algorithm.advantage = 'gae', or algorithm.objectives.{trained[0]} = false",
        )  # fmt: skip


def _provider(column: str) -> str:
    makers = [
        f"{slot} {name!r}" for slot, atoms in SLOTS.items() for name, entry in atoms.items() if column in entry.config.provides
    ]
    return PROVIDERS.get(column) or (f"put the {' or '.join(makers)} before it" if makers else "use another atom")


def _check_groups(config: AlgorithmConfig, run: RunFacts) -> None:
    """Atoms that compare siblings have enough of them, after composers have left some out."""
    size, cut_by = run.group_size, ""
    for path, atom in config.atoms():
        if atom.min_group_size > size:
            composer = f", algorithm.{cut_by}" if cut_by else ""
            refuse(
                f"{atom.type!r} compares siblings, and there are too few",
                f"algorithm.{path}", run.key("group_size") + composer, got=f"{size} of {run.group_size} samples a prompt train",
                expected=f"{atom.min_group_size} or more",
                hint=f"raise {run.key('group_size')}{composer and ' or keep_fraction'}, or use an atom that needs no siblings, "
                "such as the advantage 'reward_to_go'",
            )  # fmt: skip
        kept = getattr(atom, "kept", None)
        if kept is not None and kept(size) < size:
            size, cut_by = kept(size), path


def _check_queries(config: AlgorithmConfig, run: RunFacts) -> None:
    """Prompts that ask the same are only compared where they meet in a batch."""
    for path, atom in config.atoms():
        query = getattr(atom, "query", None)
        if query is not None and query != f"item.{run.together}":
            refuse(
                f"{atom.type!r} compares prompts of one question, which a shuffled data set keeps apart",
                f"algorithm.{path}.query", run.key("together"), got=f"{query}, {run.together or 'not set'}",
                expected="the same number of the item", hint=f"set {run.key('together')} = {str(query).removeprefix('item.')!r}",
            )  # fmt: skip


def _check_lengths(config: AlgorithmConfig, run: RunFacts) -> None:
    for index, atom in enumerate(config.reward):
        limit = getattr(atom, "max_tokens", None)
        if (
            limit is not None
            and run.max_new_tokens is not None
            and limit - getattr(atom, "buffer_tokens", 0) >= run.max_new_tokens
        ):
            refuse(
                "the length penalty starts beyond the longest response",
                f"algorithm.reward[{index}].max_tokens", run.key("max_new_tokens"), got=f"{limit}, {run.max_new_tokens}",
                hint=f"set max_tokens to {run.max_new_tokens}",
            )  # fmt: skip


def _check_idle_options(config: AlgorithmConfig) -> None:
    """An option that was set, and that another one makes useless, is a mistake."""
    for path, atom in config.atoms():
        for option, cause in _idle(atom):
            refuse(
                f"an option of {atom.type!r} has no effect",
                f"algorithm.{path}.{option}", f"algorithm.{path}.{cause}",
                got=f"{option} = {getattr(atom, option)!r}, {cause} = {getattr(atom, cause)!r}", hint=f"leave {option} out",
            )  # fmt: skip


def _idle(atom: Atom) -> Iterator[tuple[str, str]]:
    """Idle options whose value is not their default, each with what makes it idle."""
    fields = type(atom).model_fields
    for option, cause in atom.idle_options.items():
        if getattr(atom, option) != fields[option].get_default(call_default_factory=True):
            yield option, cause
