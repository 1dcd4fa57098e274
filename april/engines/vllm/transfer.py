"""Weights into a running vLLM, through vLLM's own weight-transfer interface.

The backends that come with vLLM move weights over NCCL, CUDA IPC or RDMA. This one takes them from where a CPU, or one
machine, or a shared file system has them:

    offer   tensors of the same process; nothing is copied but into the model
    files   a safetensors file, for workers in other processes: each maps it and reads its own part
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from april.engines.vllm.files import WeightFiles, named_once

BACKEND = "april"
_SERIAL = itertools.count()
_OFFERED: dict[int, Mapping[str, torch.Tensor]] = {}


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are: an offer, or a file that holds every tensor.

    vLLM packs several tensors into one layer and makes a layer anew as a whole, so half a layer must not be sent.

    Attributes:
        offer: of this process; -1 for none.
        file: path of a safetensors file.
        aliases: name -> another name of the same tensor, for weights that are tied.
    """

    offer: int = -1
    file: str = ""
    aliases: dict[str, str] = field(default_factory=dict)


class AprilTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads tensors that are offered in this process, or that lie in a file."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """No connection to make."""

    def start_weight_update(self) -> None:
        """Give the layers back the form of a checkpoint: kernels may hold them packed."""
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Pack the layers again, into the memory that they had."""
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one offer; on a CPU there is no device to wait for."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Copy the tensors into the model; vLLM's loader fuses and casts as it needs."""
        found = _OFFERED[update_info.offer].items() if update_info.offer >= 0 else _read(update_info)
        with torch.inference_mode():
            self.model.load_weights((name, tensor.detach()) for name, tensor in found)  # type: ignore[operator]

    def shutdown(self) -> None:
        """Nothing is held."""


def _read(info: UpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file, one after the other, under all their names."""
    others: dict[str, list[str]] = {}
    for alias, name in info.aliases.items():
        others.setdefault(name, []).append(alias)
    with safe_open(info.file, framework="pt") as file:
        for name in list(file.keys()):
            tensor = file.get_tensor(name)
            yield from ((each, tensor) for each in (name, *others.get(name, ())))


def register() -> None:
    """Make the backend known to vLLM; a second call changes nothing."""
    with suppress(ValueError):  # it is known already
        WeightTransferEngineFactory.register_engine(BACKEND, AprilTransfer)


def send(
    llm: Any, weights: Mapping[str, torch.Tensor], version: int, tied: Mapping[str, str], files: WeightFiles | None = None
) -> None:
    """Load weights into every worker of an engine and name their version.

    Args:
        llm: a `vllm.v1.engine.llm_engine.LLMEngine` in this process whose weight-transfer backend is this one.
        weights: Hugging Face name -> tensor.
        version: what replies will carry from now on.
        tied: name -> another name of the same tensor.
        files: for workers in other processes; without it they are in this one, and read the tensors in place.
    """
    with _offered(weights, tied) if files is None else _filed(weights, version, tied, files) as info:
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": info})
        llm.collective_rpc("finish_weight_update")
    llm.set_weight_version(str(version))


@contextmanager
def _offered(weights: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    offer = next(_SERIAL)
    _OFFERED[offer] = {**weights, **{name: weights[source] for name, source in tied.items() if name not in weights}}
    try:
        yield {"offer": offer}
    finally:
        del _OFFERED[offer]


@contextmanager
def _filed(
    weights: Mapping[str, torch.Tensor], version: int, tied: Mapping[str, str], files: WeightFiles
) -> Iterator[dict[str, Any]]:
    path = files.write(named_once(weights, tied), version)
    try:
        yield {"file": path, "aliases": dict(tied)}
    finally:
        files.remove(path)
