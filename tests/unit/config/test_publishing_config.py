"""The section `publishing`: options of one transport, and recipes that publish nothing or would wait for too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from april.config.publishing import PublishingConfig
from april.config.resolve import resolve
from april.core.errors import RecipeError
from april.distributed.layout import Layout
from april.run.checks import check_recipe
from april.run.processes import transport_of

CHILD = ("engine.process=child",)


def checked(*overrides: str) -> list[Any]:
    return check_recipe(resolve("quickstart", overrides=list(overrides)).recipe)


def test_shared_memory_is_the_default_and_needs_nothing() -> None:
    assert PublishingConfig() == PublishingConfig(transport="shared_memory")
    assert checked() and checked(*CHILD)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"folder": "x"}, "publishing.folder has no effect .* it is for disk"),
        ({"transport": "broadcast", "fsync": True}, "publishing.fsync has no effect"),
        ({"transport": "disk", "deadline_s": 5.0}, "publishing.deadline_s has no effect .* it is for broadcast"),
        ({"bucket_mib": 1}, "bucket_mib has no effect .* it is for disk and broadcast"),
        ({"transport": "pigeon"}, "Input should be"),
    ],
)
def test_an_option_of_another_transport_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        PublishingConfig(**options)


@pytest.mark.parametrize("transport", ["disk", "broadcast"])
def test_where_everything_is_in_one_process_nothing_is_published(transport: str) -> None:
    with pytest.raises(RecipeError, match="nothing is published") as caught:
        checked(f"publishing.transport={transport}")
    assert caught.value.where == "publishing" and 'engine.process = "child"' in str(caught.value.hint)
    for places in (CHILD, ("training.process=child",), ("training.ranks=2",)):
        assert checked(f"publishing.transport={transport}", *places)


def test_with_ray_its_own_store_is_the_transport() -> None:
    with pytest.raises(RecipeError, match="Ray's object store"):
        checked("publishing.transport=disk", "backend=ray")


def test_a_broadcast_gives_up_before_engines_are_given_up() -> None:
    with pytest.raises(RecipeError, match="would be given up") as caught:
        checked("publishing.transport=broadcast", "publishing.deadline_s=60", *CHILD)
    assert "less than 60" in str(caught.value.hint)
    assert checked("publishing.transport=broadcast", "publishing.deadline_s=59", *CHILD)


def test_a_broadcast_does_not_roll() -> None:
    rolling = ("schedule.type=rolling", "engine.replicas=2", *CHILD)
    with pytest.raises(RecipeError, match="one after the other") as caught:
        checked("publishing.transport=broadcast", *rolling)
    assert caught.value.where == "publishing.transport, schedule.type"
    assert checked(*rolling)


def test_the_files_lie_in_the_run_s_folder_or_where_the_recipe_says(tmp_path: Path) -> None:
    layout = Layout.of({"w": torch.zeros(3)})

    def made(*overrides: str) -> Any:
        recipe = resolve("quickstart", overrides=[*overrides, "seed=7", "name=r", *CHILD]).recipe
        return transport_of(recipe, layout, tmp_path / "run")

    disk = made("publishing.transport=disk")
    assert (disk.name, disk.folder, disk.file_bytes) == ("disk", tmp_path / "run" / "weights", 64 << 20)
    assert not disk.folder.exists(), "nothing is written before the first version"
    assert made("publishing.transport=disk", f"publishing.folder='{tmp_path}/{{name}}-{{seed}}'").folder == tmp_path / "r-7"
    broadcast = made("publishing.transport=broadcast", "publishing.bucket_mib=2", "publishing.deadline_s=3")
    assert (broadcast.name, broadcast._bucket_bytes, broadcast._deadline_s) == ("broadcast", 2 << 20, 3.0)
    broadcast.close()
    assert made().name == "shared_memory"
