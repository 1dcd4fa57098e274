"""A study: a base cell, arms that are compared, a grid over any field, seeds, and what a publication says should come out.

    seeds = 3
    baseline = "sync"
    [base]                                     # fields of a cell
    groups_per_step = 32
    [base.workload]
    mean_tokens = 6500
    [grid]                                     # every combination of these
    "workload.sigma" = [0.5, 0.9]
    [arms.sync]
    schedule = { type = "sync" }
    [arms.april]
    schedule = { type = "april", max_lag_steps = 4 }
    grid = { "schedule.over_provision" = [1.5, 2.0] }      # of this arm alone

`[[grid.case]]` varies several fields together: each is a table with a `label` and fields of a cell.
All arms of one point of the grid and one seed see the same lengths, so ratios are paired.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from april import registry
from april.config.load import Layers, Tree, parse_override, read_toml, recipe_names
from april.config.schema import Config
from april.core.errors import RecipeError, choice, nearest
from april.simulate.cell import CellConfig
from april.simulate.recorded import recording_files

CASE = "case"
FORMAT = 1
"""Number of the meaning of a cell; results of another number are not taken over."""


class Expectation(Config):
    """One published figure: what should come out, and how far off it may be."""

    what: str = Field(description="the claim in a few words")
    figure: str = Field("consumed_tokens_per_s", description="name of a figure of the results")
    arm: str | tuple[str, ...] = Field(description="an arm; of several the one with the highest figure")
    against: str | None = Field(None, description="divide by this arm's figure, seed by seed; the figure itself when left out")
    where: dict[str, Any] = Field(default_factory=dict, description="points of the grid; all of them when left out")
    low: float = Field(description="lower end of the acceptable range")
    high: float = Field(description="upper end")
    published: str = Field("", description="the published value and where it stands")


class StudyConfig(Config):
    """A study file."""

    name: str = Field("study", description="shown in the report, and the name of its folder")
    description: str = Field("", description="what is asked, in a sentence or two")
    seeds: int = Field(3, ge=1, description="runs of each cell, with seeds 0, 1, ...")
    baseline: str | None = Field(None, description="arm that the others are divided by; the first one when left out")
    base: dict[str, Any] = Field(default_factory=dict, description="fields of a cell")
    arms: dict[str, dict[str, Any]] = Field(description="name -> what differs from the base; `grid` inside is of this arm alone")
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict, description="dotted field -> values; all combinations are run")
    expect: tuple[Expectation, ...] = Field((), description="published figures to compare with")
    trace_samples: int = Field(500, ge=0, description="samples drawn in the trace of each cell's first seed; 0: no trace")

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if not self.arms:
            raise ValueError("a study needs at least one arm")
        return self


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study.

    Attributes:
        arm: name, with the values of the arm's own grid.
        point: dotted field -> value in the study's grid.
        inputs: digest of the files that it reads.
    """

    arm: str
    point: tuple[tuple[str, Any], ...]
    seed: int
    config: CellConfig
    inputs: str = ""

    @property
    def key(self) -> str:
        """A name that changes with everything that the result depends on."""
        content = json.dumps([FORMAT, self.inputs, self.seed, self.config.model_dump(mode="json")], sort_keys=True)
        digest = hashlib.blake2b(content.encode(), digest_size=5).hexdigest()
        return f"{slug(self.arm)}-seed{self.seed}-{digest}"

    @property
    def label(self) -> str:
        """Arm and point."""
        return self.arm + (f" ({point_label(self.point)})" if self.point else "")


@dataclass(frozen=True, slots=True)
class Study:
    """A study with its cells.

    Attributes:
        folder: where relative paths of the file start.
    """

    config: StudyConfig
    cells: tuple[Cell, ...]
    folder: Path | None = None

    @property
    def arms(self) -> list[str]:
        """Names of all arms, those of their own grids apart."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def points(self) -> list[tuple[tuple[str, Any], ...]]:
        """Points of the grid."""
        points: list[tuple[tuple[str, Any], ...]] = []
        for cell in self.cells:
            if cell.point not in points:
                points.append(cell.point)
        return points

    @property
    def baseline(self) -> str:
        """The arm that the others are divided by."""
        return self.config.baseline or self.arms[0]


def load_study(name: str, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, or one that comes with April, and lay it out.

    Raises:
        RecipeError: for anything that cannot be understood, with its path and the nearest known name.
    """
    path = find_study(name)
    layers = Layers()
    layers.add(read_toml(path, "studies"), path.name)
    for override in overrides:
        layers.add(parse_override(override), "command line")
    return make_study(layers.values, path.parent)


def make_study(tree: Mapping[str, Any], folder: Path | None = None) -> Study:
    """Validate a study's data and lay out its cells."""
    for key in tree.keys() & CellConfig.model_fields.keys() - StudyConfig.model_fields.keys():
        raise RecipeError(
            "a field of a cell stands beside the base",
            where=key,
            got=tree[key],
            expected=f"base.{key}, or arms.NAME.{key} for one arm",
            hint=f"did you mean 'base.{key}'?",
        )
    config = registry.validate(StudyConfig, tree, "")
    if not isinstance(config, StudyConfig):
        raise RecipeError("not a study", got=type(config).__name__)
    for kind in registry.KINDS:  # a name in the base counts, although every arm may have another
        part = config.base.get(kind)
        if isinstance(part, Mapping) and "type" in part:
            registry.config_class(kind, part["type"], f"base.{kind}.type")
    cells = tuple(replace(cell, inputs=_inputs(cell.config, folder)) for cell in _cells(config))
    study = Study(config, cells, folder)
    known = study.arms
    named = [("baseline", config.baseline), *(("expect.against", e.against) for e in config.expect)]
    named += [("expect.arm", arm) for e in config.expect for arm in ((e.arm,) if isinstance(e.arm, str) else e.arm)]
    for where, arm in named:
        if arm is not None and arm not in known:
            raise RecipeError("unknown arm", where=where, got=arm, **choice(arm, known, "see [arms]"))
    for expectation in config.expect:
        for key in expectation.where:
            if key not in config.grid:
                raise RecipeError("not in the grid", where="expect.where", got=key, **choice(key, config.grid, "see [grid]"))
    return study


def find_study(name: str) -> Path:
    """A TOML file, or a study that comes with April.

    Raises:
        RecipeError: neither.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    packaged = Path(str(files("april") / "recipes" / "study" / f"{name}.toml"))
    if packaged.exists():
        return packaged
    raise RecipeError(
        "there is no such study",
        where="STUDY",
        got=name,
        expected="a TOML file or a study of April",
        hint=nearest(name, recipe_names("study")),
    )


def _cells(config: StudyConfig) -> Iterator[Cell]:
    for values in _combinations(config.grid):
        point = tuple((key, _case(value)["label"] if key == CASE else value) for key, value in values)
        for name, fields in config.arms.items():
            own = fields.get("grid", {})
            if not isinstance(own, Mapping):
                raise RecipeError("a grid is a table", where=f"arms.{name}.grid", got=own, expected='"field" = [values]')
            for variant in _combinations(own):
                label = name + "".join(f" {key.rsplit('.', 1)[-1]}={value}" for key, value in variant)
                layers = Layers()
                layers.add(config.base, "base")
                for key, value in values:
                    layers.add(_nested(key, value), "grid")
                layers.add({key: value for key, value in fields.items() if key != "grid"}, f"arms.{name}")
                for key, value in variant:
                    layers.add(_nested(key, value), f"arms.{name}.grid")
                cell = registry.validate(CellConfig, layers.values, f"arms.{name}" if len(config.arms) > 1 else "base")
                if isinstance(cell, CellConfig):
                    yield from (Cell(label, point, seed, cell) for seed in range(config.seeds))


def _inputs(config: CellConfig, folder: Path | None) -> str:
    """A digest of what a cell reads besides its configuration; missing files are found out about when it is run."""
    digest = hashlib.blake2b(digest_size=8)
    for name in filter(None, (config.costs, config.workload.path)):
        path = Path(name) if Path(name).exists() or folder is None else folder / name
        for file in recording_files(path):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise RecipeError("a grid has a list of values for each field", where=f"grid.{key}", got=values, expected="[1, 2]")
    for values in itertools.product(*grid.values()):
        yield tuple((key, _frozen(value)) for key, value in zip(grid, values, strict=True))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _case(value: Any) -> Tree:
    if not isinstance(value, Mapping) or not isinstance(value.get("label"), str):
        raise RecipeError("a case is a table with a label", where="grid.case", got=value, expected='label = "..."')
    return dict(value)


def _nested(key: str, value: Any) -> Tree:
    if key == CASE:
        return {name: inner for name, inner in _case(value).items() if name != "label"}
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def slug(text: str) -> str:
    """A name for a file."""
    return "".join(c if c.isalnum() or c in "._=" else "-" for c in text).strip("-")


def point_label(point: Sequence[tuple[str, Any]]) -> str:
    """A point of the grid in words."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in point)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {_short(inner)}" for key, inner in value.items()) + "}"
    return str(value)
