"""`april list`."""

from __future__ import annotations

from typing import Any

from april.cli.main import emit


def list_command(kind: str | None, as_json: bool) -> None:
    """Print components with their options; nothing heavy is imported."""
    from april.core.errors import RecipeError, nearest

    table = components()
    if kind is not None and kind not in table:
        raise RecipeError("there is no such kind of component", got=kind, hint=nearest(kind, table))
    shown = {kind: table[kind]} if kind else table
    if as_json:
        emit(shown)
        return
    for name, entries in shown.items():
        print(name)
        for entry in entries:
            print(f"  {entry['name']:<16} {entry['summary']}")
            for option in entry["options"]:
                print(f"      {option['name']:<22} {option['default']:<14} {option['help']}")


def components() -> dict[str, list[dict[str, Any]]]:
    """Kind -> entries with name, summary and options."""
    from april import registry
    from april.algorithms.spec import SLOTS
    from april.config.load import find_recipe, recipe_names

    table = {
        kind: [_entry(name, registry.config_class(kind, name, kind)) for name in registry.names(kind)] for kind in registry.KINDS
    }
    table |= {
        slot: [_entry(name, entry.config) for name, entry in sorted(atoms.items())] for slot, atoms in SLOTS.items() if atoms
    }
    table["presets"] = [{"name": name, "summary": "algorithm.preset", "options": []} for name in recipe_names("algorithm")]
    table["recipes"] = [
        {"name": name, "summary": find_recipe(name).read_text().splitlines()[0].lstrip("# "), "options": []}
        for name in recipe_names()
    ]
    return table


def _entry(name: str, model: Any) -> dict[str, Any]:
    summary = (model.__doc__ or "").strip().splitlines()[0]
    options = [
        {
            "name": key,
            "default": "required" if field.is_required() else repr(field.get_default(call_default_factory=True)),
            "help": field.description or "",
        }
        for key, field in model.model_fields.items()
        if key != "type"
    ]
    return {"name": name, "summary": summary, "options": options}
