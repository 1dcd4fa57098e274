"""`april list`."""

from __future__ import annotations

from typing import Any

from april.cli.output import emit

PACKAGED = {
    "algorithm.preset": "algorithm",
    "recipes": "run",
    "warm-start": "warm_start",
    "comparison": "comparison",
    "studies": "study",
}
"""Kind -> folder of the recipes that come with April."""


def list_command(kind: str | None, as_json: bool) -> None:
    """Print components with their options; nothing heavy is imported.

    Args:
        kind: such as "schedule" or "algorithm.surrogate"; "algorithm" alone means all its slots, and a slot's own name will
            do where no other kind has it.
        as_json: one line of JSON instead.
    """
    from april.core.errors import RecipeError, choice

    table = components()
    if kind is None:
        shown = {name: entries for name, entries in table.items() if entries}
    else:
        wanted = kind if kind in table else f"algorithm.{kind}"
        shown = {name: entries for name, entries in table.items() if name == wanted or name.startswith(f"{kind}.")}
    if not shown:
        raise RecipeError(
            "there is no such kind of component", where="KIND", got=kind, **choice(str(kind), table, "leave it out")
        )
    if as_json:
        emit(shown)
        return
    for name, entries in shown.items():
        print(name)
        for entry in entries:
            print(f"  {entry['name']:<16} {entry['summary']}")
            for line in _source(entry):
                print(f"      {line}")
            for option in entry["options"]:
                print(f"      {option['name']:<22} {option['default']:<14} {option['help']}".rstrip())
        if not entries:
            print("  nothing is registered yet")


def components() -> dict[str, list[dict[str, Any]]]:
    """Kind -> entries with name, summary and options."""
    from april import registry
    from april.algorithms import catalogue
    from april.algorithms.spec import SLOTS
    from april.config.load import find_recipe, recipe_names

    table = {
        kind: [_entry(name, registry.config_class(kind, name, kind)) for name in registry.names(kind)] for kind in registry.KINDS
    }
    table |= {f"algorithm.{slot}": [] for slot in SLOTS}
    for method in catalogue.methods():
        table[f"algorithm.{method.slot}"].append(_atom(method, SLOTS[method.slot][method.name].config))
    for title, others in (("algorithm.elsewhere", catalogue.ELSEWHERE), ("algorithm.outside", catalogue.OUTSIDE)):
        table[title] = [
            {
                "name": other.name,
                "summary": other[2].replace("`", ""),
                "paper": other.paper,
                "golden": other.golden,
                "options": [],
            }
            for other in others
        ]
    for title, folder in PACKAGED.items():
        found = [(name, find_recipe(name, folder=folder)) for name in recipe_names(folder)]
        table[title] = [{"name": name, "summary": catalogue.first_sentence(path), "options": []} for name, path in found]
    return table


def _atom(method: Any, model: Any) -> dict[str, Any]:
    """An atom with what the catalogue says of it."""
    info = method.info._asdict() if method.info is not None else {}
    return _entry(method.name, model) | info | {"reads": list(method.reads), "presets": list(method.presets)}


def _source(entry: dict[str, Any]) -> list[str]:
    """What the catalogue says, as lines."""
    from april.algorithms.catalogue import shortened

    if "paper" not in entry:
        return []
    if "formula" not in entry:
        return [entry["paper"]]
    source = f"{entry['paper']}; certainty {entry['certainty']}"
    reads = f"; reads {', '.join(entry['reads'])}" if entry["reads"] else ""
    presets = f"; presets {shortened(entry['presets'])}" if entry["presets"] else ""
    return [f"= {entry['formula']}", source + reads + presets]


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
