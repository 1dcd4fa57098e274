"""A policy whose weights lie in parts on several ranks (FSDP2): a layer is whole only while it computes.

    root      embeddings, final norm and output layer, gathered around one call of the policy
    layers    each a unit of its own, gathered when the forward or the backward pass comes to it

Parameters keep their Hugging Face names and are DTensors over the mesh axis "data". The lean forward of
`april.models.lean` is used as it is: it becomes the forward of the modules whose weights it reads, so that the hooks that
gather those weights run before it. Fully sharded data parallel: Zhao et al. 2023; ZeRO: Rajbhandari et al. 2020.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from april.core.errors import ModelError
from april.models.attention import PackedLayout
from april.models.lean import LeanModel
from april.models.policy import PackedSequences, Policy, ResponseLogprobs, frozen_names, no_progress_bars
from april.training.config import ShardingConfig, TrainerConfig
from april.training.sharded_ranks import Ranks

_DTYPES = {"same": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class ShardedPolicy(Policy):
    """See `Policy`; every method but `packed` is called by all ranks together."""

    def __init__(self, policy: Policy, ranks: Ranks, config: TrainerConfig) -> None:
        """Cut a policy into parts; each rank keeps its own.

        Args:
            policy: whole and the same on every rank; its module is taken over.
            ranks: who shares it.
            config: precision, offload and checkpointing.

        Raises:
            ModelError: its layers are not found.
        """
        super().__init__(policy.module, gradient_checkpointing=config.gradient_checkpointing)
        self._ranks, self.device = ranks, ranks.device
        self._autocast = config.autocast and config.sharding.param_dtype == "same" and ranks.device.type == "cuda"
        layers = getattr(self.module.base_model, "layers", None)
        if layers is None:
            raise ModelError(
                "the decoder layers of a model to shard are not found",
                where=f"model type {self.module.config.model_type}",
                expected="base_model.layers",
                hint="set training.ranks = 1",
            )
        if self._lean is not None:
            self._lean = _ShardedLean(self.module, self._lean.shape)
        self.module.forward = self._forward
        _shard([*layers, self.module], ranks, config.sharding)

    def _forward(
        self, sequences: PackedSequences, temperatures: Tensor | None = None, entropy: bool = False
    ) -> ResponseLogprobs | Tensor:
        """The forward of the module, whose own weights are gathered before it: log-probs, or values without temperatures."""
        if temperatures is None:
            return super().response_values(sequences).clone()  # a hook hangs on what a module returns: no view
        return super().response_logprobs(sequences, temperatures, entropy=entropy)

    def response_logprobs(self, sequences: PackedSequences, temperatures: Tensor, *, entropy: bool = False) -> ResponseLogprobs:
        """See `Policy.response_logprobs`; each rank gives sequences of its own."""
        output: ResponseLogprobs = self._called(sequences, temperatures, entropy)
        return output

    def response_values(self, sequences: PackedSequences) -> Tensor:
        """See `Policy.response_values`; each rank gives sequences of its own."""
        values: Tensor = self._called(sequences)
        return values

    def _called(self, *arguments: Any) -> Any:
        output = self.module(*arguments)
        if not torch.is_grad_enabled():
            self.module.reshard()  # no backward pass comes to do it, and the next forward must see new weights
        return output

    def response_hidden(self, sequences: PackedSequences) -> Tensor:
        """Not of a policy in parts.

        Raises:
            ModelError: always.
        """
        raise ModelError("hidden states of a sharded policy are not given out", where="training.ranks", expected="1 rank")

    def copy(self) -> Policy:
        """Not of a policy in parts.

        Raises:
            ModelError: always.
        """
        raise ModelError("a sharded policy cannot be copied", where="training.ranks", expected="1 rank")

    def weights(self) -> dict[str, Tensor]:
        """See `Policy.weights`; whole tensors in CPU memory, on the first rank; the others help, and get nothing."""
        state = self.state()
        return state if self.adapters is None or not state else self.adapters.published(state)

    def state(self) -> dict[str, Tensor]:
        """See `Policy.state`; whole tensors in CPU memory, on the first rank; the others help, and get nothing."""
        found: dict[str, Tensor] = {}
        left_out = frozen_names(self.module)
        state = {name: tensor for name, tensor in self.module.state_dict().items() if name not in left_out}
        first = {id(parameter): name for name, parameter in self.module.named_parameters()}
        ties = {name: first[id(parameter)] for name, parameter in self.module.named_parameters(remove_duplicate=False)}
        for name, tensor in state.items():
            owner = ties.get(name, name)
            if owner == name:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._ranks.first:  # one tensor under two names stays one: an export writes it once
                found[name] = whole.detach().cpu() if owner == name else found[owner]
        return found

    def save(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write an ordinary Hugging Face folder, or one of adapters, from the first rank."""
        weights = self.weights()
        if self._ranks.first:
            if self.adapters is not None:
                self.adapters.save(folder, weights)
            else:
                with no_progress_bars():
                    self.module.save_pretrained(str(folder), state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
        self._ranks.wait()


class _ShardedLean(LeanModel):
    """The lean forward with each layer called as a module, so that its weights are gathered first."""

    def __init__(self, module: Any, shape: Any) -> None:
        super().__init__(module, shape)
        for layer in module.model.layers:
            layer.forward = partial(super()._layer, layer)

    def _layer(self, layer: Any, x: Tensor, tables: tuple[Tensor, Tensor], layout: PackedLayout) -> Tensor:
        found: Tensor = layer(x, tables, layout)
        return found


def _shard(modules: list[Any], ranks: Ranks, config: ShardingConfig) -> None:
    """Make each module a unit whose weights are gathered together; the last one holds all others."""
    cuda = ranks.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=cuda) if config.cpu_offload else OffloadPolicy()
    precision = MixedPrecisionPolicy(
        param_dtype=_DTYPES[config.param_dtype], reduce_dtype=_DTYPES[config.reduce_dtype], cast_forward_inputs=False
    )
    for module in modules:
        whole = module is modules[-1]  # the root's weights are needed first in the backward pass: they stay
        keep = None if whole and config.reshard_after_forward else config.reshard_after_forward
        fully_shard(module, mesh=ranks.mesh, reshard_after_forward=keep, mp_policy=precision, offload_policy=offload)
    for module in modules:
        module.set_gradient_divide_factor(1.0)  # denominators are those of the whole step: gradients add up
        module.set_force_sum_reduction_for_comms(True)
