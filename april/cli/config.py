"""`april config`."""

from __future__ import annotations

from april.cli.output import emit

MAX_WIDTH = 100
"""Longer values are cut in the table; --toml shows them whole."""


def config_command(recipe: str, overlays: list[str], overrides: list[str], toml: bool, as_json: bool) -> None:
    """Print a resolved recipe."""
    from april.api import resolve_recipe
    from april.config.resolve import explain

    resolved = resolve_recipe(recipe, overlays, overrides)
    if toml:
        print(resolved.to_toml(), end="")
    elif as_json:
        emit({"recipe": resolved.values(), "origins": resolved.layers.origins, "dropped": resolved.layers.dropped})
    else:
        rows = explain(resolved)
        path_width = max(len(path) for path, _, _ in rows)
        value_width = min(40, max(len(value) for _, value, _ in rows))
        for path, value, origin in rows:
            short = value if len(value) <= MAX_WIDTH else value[: MAX_WIDTH - 4] + " ..."
            print(f"{path:<{path_width}}  {short:<{value_width}}  # {origin}")
