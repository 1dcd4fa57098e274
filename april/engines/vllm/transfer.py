"""Weights into a running vLLM, through vLLM's own weight-transfer interface.

The backends that come with vLLM move weights over NCCL, CUDA IPC or RDMA. This one takes tensors that are in the same
process already, which is all that a CPU, or one machine with one process, needs: nothing is copied but into the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "april"
_SERIAL = itertools.count()
_OFFERED: dict[int, Mapping[str, torch.Tensor]] = {}


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Which offer to take."""

    offer: int = -1


class SameProcessTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads tensors that another part of this process has offered."""

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
        """Copy the offered tensors into the model; vLLM's loader fuses and casts as it needs."""
        weights = _OFFERED[update_info.offer]
        with torch.inference_mode():
            self.model.load_weights((name, tensor.detach()) for name, tensor in weights.items())  # type: ignore[operator]

    def shutdown(self) -> None:
        """Nothing is held."""


def register() -> None:
    """Make the backend known to vLLM; a second call changes nothing."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SameProcessTransfer)


def send(llm: Any, weights: Mapping[str, torch.Tensor], version: int) -> None:
    """Load weights into every worker of an engine in this process and name their version.

    Args:
        llm: a `vllm.v1.engine.llm_engine.LLMEngine` whose weight-transfer backend is this one.
        weights: Hugging Face name -> tensor.
        version: what replies will carry from now on.
    """
    offer = next(_SERIAL)
    _OFFERED[offer] = weights
    try:
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": {"offer": offer}})
        llm.collective_rpc("finish_weight_update")
    finally:
        del _OFFERED[offer]
    llm.set_weight_version(str(version))
