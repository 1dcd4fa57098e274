"""A reward that is somebody's Python function, by import path."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.errors import RecipeError, nearest
from april.core.sample import Sample
from april.rewards.base import Verifier


class PythonReward(Config):
    """A Python function (text, sample, item) that returns one number, named parts, or an `april.core.group.Reward`."""

    type: Literal["python"] = "python"
    path: str = Field(description='"package.module:function" or "path/to/file.py:function".')
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the function.")

    @field_validator("path")
    @classmethod
    def _has_function(cls, value: str) -> str:
        module, _, function = value.rpartition(":")
        if not module or not function:
            raise ValueError('expected "module:function" or "path/to/file.py:function"')
        return value

    def build(self) -> Verifier:
        """The verifier.

        Raises:
            RecipeError: when the file, module or function is not there, does not import, or is not callable.
        """
        return Imported(self.path, self.options)


class Imported:
    """A function found by its path; pickled as the path, so worker processes import it themselves."""

    def __init__(self, path: str, options: Mapping[str, Any] | None = None) -> None:
        self.path, self.options = path, dict(options or {})
        self._function = load_function(path)

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Any:
        return self._function(text, sample, item, **self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Imported, (self.path, self.options))


def load_function(path: str, where: str = "reward.path") -> Callable[..., Any]:
    """The function at "module:function" or "file.py:function".

    Raises:
        RecipeError: when it is not there, its module does not import, or it is not callable.
    """
    target, _, name = path.rpartition(":")
    try:
        module = _from_file(Path(target), where) if target.endswith(".py") else importlib.import_module(target)
    except RecipeError:
        raise
    except Exception as error:  # a stranger's module may raise anything while it is imported
        raise RecipeError(
            "a reward's module cannot be imported",
            where=where,
            got=f"{target} ({type(error).__name__}: {error})",
            expected="an importable module, or a file that ends in .py",
            hint="try it alone: python -c 'import ...'; modules are looked up on PYTHONPATH",
        ) from error
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(
            "a reward's module has no such function", where=where, got=path, expected="a function", hint=nearest(name, own)
        )
    function = getattr(module, name)
    if not callable(function):
        raise RecipeError(
            "a reward is not callable", where=where, got=f"{path}: {type(function).__name__}", expected="a function"
        )
    return function  # type: ignore[no-any-return]


def _from_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        hint = "check the path; it is relative to the working directory"
        raise RecipeError("a reward's file does not exist", where=where, got=str(path), expected="a Python file", hint=hint)
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    name = f"april_reward_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError("a reward's file cannot be read as Python", where=where, got=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look themselves up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class ImportedModel:
    """A function prompt -> answer found by its path, in place of a model; pickled as the path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._function = load_function(path)

    def __call__(self, prompt: str) -> str:
        return str(self._function(prompt))

    def __reduce__(self) -> tuple[Any, ...]:
        return (ImportedModel, (self.path,))
