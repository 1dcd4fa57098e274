"""What a recipe has to say for a row of a plan: an overlay that `april train RECIPE --overlay FILE` takes."""

from __future__ import annotations

import shlex
from pathlib import Path

import tomli_w

from april.config.load import Tree
from april.simulate.cost import EFFICIENCIES
from april.simulate.hardware import model
from april.simulate.plan import Plan, PlanRow
from april.simulate.plan_report import devices, title
from april.simulate.study import slug


def overlay(plan: Plan, row: PlanRow) -> Tree:
    """Schedule, batch and length limit; for named devices the policy, the engines and who has which device, too.

    Measured constants are those of a recipe's own engine and trainer, which stay as they are.
    """
    request = plan.request
    tree: Tree = {
        "sampling": {"max_new_tokens": request.workload.max_tokens},
        "batch": {"groups_per_step": request.groups_per_step, "group_size": request.group_size},
        "schedule": dict(row.candidate.schedule),
    }
    if request.measured:
        return tree
    train = row.candidate.train_devices
    engine = {"replicas": (request.gpus - (train or 0)) // plan.tp, "tensor_parallel": plan.tp}
    return {
        **tree,
        "model": {"path": model(request.model).path},
        "engine": {"type": "vllm", "process": "child", "max_running": EFFICIENCIES["typical"].max_running, **engine},
        "training": {"process": "child", "ranks": train or request.gpus},
        **({} if _unplaced(plan, row) else _placed(plan.tp, shared=train is None)),
    }


def _placed(tp: int, shared: bool) -> Tree:
    roles = {"trainer": {"gpus": 1}, "engine": {"gpus": 1 if shared else tp}}
    return {"backend": "ray", "placement": {"devices": "shared" if shared else "split", **roles}}


def _unplaced(plan: Plan, row: PlanRow) -> bool:
    """Devices in turn are shared one by one: an engine of several has no place among the trainer's ranks."""
    return row.candidate.train_devices is None and plan.tp > 1


def write_overlays(plan: Plan, folder: Path) -> list[Path]:
    """Write an overlay for each row of the front; gives the files, in the order of the front."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for row in plan.front:
        path = folder / f"{slug(f'{row.candidate.label} {devices(plan, row)}')}.toml"
        path.write_text(_head(plan, row) + tomli_w.dumps(overlay(plan, row)), encoding="utf-8")
        files.append(path)
    return files


def _head(plan: Plan, row: PlanRow) -> str:
    lines = [f"{title(plan)}: {row.candidate.label}, {devices(plan, row)}"]
    if not plan.request.measured and _unplaced(plan, row):
        lines.append(f"Trainer and engines of {plan.tp} devices in turn: which devices they see is for the environment to say.")
    return "".join(f"# {line}\n" for line in lines)


def command(recipe: str, file: Path) -> str:
    """What runs a row."""
    return shlex.join(["april", "train", recipe, "--overlay", str(file)])
