"""Weights and moments as torch distributed checkpoints: each rank writes its parts, any number of ranks reads them.

    shards/     weights.NAME, optimizer.KIND.NAME: one logical tensor each, whatever parts it was written in
    value/      the same of the value model
    trainer.pt  small: version, counts, and of the optimiser the step numbers and options

Only what is trained is written. Names are those of Hugging Face, so neither the number of ranks nor the order of parameters
is in the files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.tensor import DTensor, distribute_tensor

from april.core.errors import CheckpointError
from april.models.policy import frozen_names

SHARDS = "shards"
VALUE_FOLDER = "value"
_WEIGHTS, _MOMENTS = "weights.", "optimizer."


def save_shards(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Write this process's parts of weights and moments; called by all ranks together.

    Returns:
        what `read_shards` needs besides, small.
    """
    names = _names(module)
    tensors = {_WEIGHTS + name: tensor.detach() for name, tensor in _distinct(module).items()}
    steps: dict[str, float] = {}
    for parameter, state in optimizer.state.items():
        steps[names[id(parameter)]] = float(state["step"])
        for kind, tensor in state.items():
            if kind != "step":
                tensors[f"{_MOMENTS}{kind}.{names[id(parameter)]}"] = tensor
    state_dict_saver.save(tensors, storage_writer=filesystem.FileSystemWriter(folder / SHARDS))
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"optimizer_steps": steps, "optimizer_options": options}


def read_shards(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, small: Mapping[str, Any]) -> dict[str, Any]:
    """Weights and optimiser as their `load_state_dict` take them, in the parts that this process holds.

    Args:
        folder: of the checkpoint.
        module, optimizer: say what is there and how it is cut; not changed.
        small: what `save_shards` returned.

    Raises:
        CheckpointError: it is of another model.
    """
    reader = filesystem.FileSystemReader(folder / SHARDS)
    try:
        saved = set(reader.read_metadata().state_dict_metadata)
    except (OSError, EOFError) as error:
        raise CheckpointError("the shards of a checkpoint cannot be read", where=str(folder / SHARDS), got=error) from error
    weights = {name: torch.empty_like(tensor) for name, tensor in _distinct(module).items()}
    wanted = {_WEIGHTS + name: tensor for name, tensor in weights.items()}
    state, order = {}, [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = _names(module)
    for index, parameter in enumerate(order):
        name = names[id(parameter)]
        if name in small["optimizer_steps"]:
            kinds = [kind for kind in ("exp_avg", "exp_avg_sq") if f"{_MOMENTS}{kind}.{name}" in saved]
            moments = {kind: torch.zeros_like(parameter.detach()) for kind in kinds}
            wanted |= {f"{_MOMENTS}{kind}.{name}": tensor for kind, tensor in moments.items()}
            state[index] = {"step": torch.tensor(small["optimizer_steps"][name], dtype=torch.float32), **moments}
    if wanted.keys() != saved:
        raise CheckpointError(
            "the trainer's state does not fit",
            where=str(folder / SHARDS),
            got=sorted(wanted.keys() ^ saved)[:4],
            expected="the tensors of this model",
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads what several wrote
        state_dict_loader.load(wanted, storage_reader=reader)
    return {"weights": _with_ties(module, weights), "optimizer": {"state": state, "param_groups": _groups(optimizer, small)}}


def in_parts(state: Mapping[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a trainer in one process, cut as `module` is; whole tensors are the same on every rank."""
    targets = module.state_dict()
    weights = {name: _cut(tensor, targets[name]) if name in targets else tensor for name, tensor in state["weights"].items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {kind: value if kind == "step" else _cut(value, order[index]) for kind, value in one.items()}
        for index, one in state["optimizer"]["state"].items()
    }
    return {**state, "weights": weights, "optimizer": {**state["optimizer"], "state": moments}}


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    cut = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return cut.to(like.to_local().device)


def _names(module: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in module.named_parameters()}


def _distinct(module: nn.Module) -> dict[str, Tensor]:
    """What `state_dict` holds and is trained, a tensor with several names under its first one."""
    own = {name for name, _ in module.named_parameters()}
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    left_out = (every - own) | frozen_names(module)
    return {name: tensor for name, tensor in module.state_dict().items() if name not in left_out}


def _with_ties(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = _names(module)
    return {
        **weights,
        **{
            name: weights[first[id(parameter)]]
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if first[id(parameter)] in weights
        },
    }


def _groups(optimizer: torch.optim.Optimizer, small: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return [{**group, **options} for group, options in zip(groups, small["optimizer_options"], strict=True)]
