"""The routers of a mixture of experts: what they choose is recorded, or chosen for them.

Engine and trainer compute the same router with other numerics, so that a token whose experts are nearly tied goes to one
expert here and to another there. Rollout routing replay (R3, "Stabilizing MoE Reinforcement Learning by Aligning Training and
Inference Routers", arXiv 2510.11370) lets the trainer use the experts that the engine used; their gates come from the training
router, which therefore still learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from april.core.errors import ModelError
from april.core.routes import Routes

_TRIAL_ROWS = 7


def replayed_gates(logits: Tensor, experts: Tensor, *, normalised: bool = True) -> Tensor:
    """Weights (T, k) of given experts by this router, with its gradient.

    gates = softmax(where(chosen, logits, -inf)); where a model does not normalise over the chosen experts, softmax(logits).
    Probabilities are in float32, as `transformers` computes them.

    Source: R3 (arXiv 2510.11370), routing replay.

    Args:
        logits: (T, E) of the router that is trained.
        experts: int64 (T, k), chosen elsewhere.
        normalised: whether the gates of a token sum to 1.
    """
    if normalised:
        return logits.gather(-1, experts).softmax(-1, dtype=torch.float32)
    return logits.softmax(-1, dtype=torch.float32).gather(-1, experts)


class Routing:
    """Watches the routers of one module, or decides for them.

    Its hooks stay with this very module: a copy of the module routes by itself.

    Attributes:
        num_layers: layers with experts.
        num_experts, top_k: of each of them.
    """

    def __init__(self, routers: list[Any], normalised: bool) -> None:
        self.num_layers, self.num_experts, self.top_k = len(routers), int(routers[0].num_experts), int(routers[0].top_k)
        self._normalised = normalised
        self._given: Tensor | None = None
        self._chosen: list[Tensor | None] = [None] * len(routers)
        for layer, router in enumerate(routers):
            router.register_forward_hook(_Hook(self, layer))

    @classmethod
    def of(cls, module: Any) -> Routing:
        """The routing of a Hugging Face causal LM; the same for the same module.

        Raises:
            ModelError: a model without experts, or whose routers work in a way that is not known here.
        """
        routers = [part for part in module.modules() if type(part).__name__.lower().endswith("topkrouter")]
        if not routers:
            raise ModelError(
                "a model without experts has no routes",
                where="engine.record_routes, training.replay_routes",
                got=getattr(getattr(module, "config", None), "model_type", type(module).__name__),
                expected="a mixture of experts, such as qwen3_moe",
                hint="set engine.record_routes = false and training.replay_routes = false",
            )
        known = [hook.routing for hook in routers[0]._forward_hooks.values() if isinstance(hook, _Hook) and hook.routing]
        return known[0] if known else cls(routers, _normalised(routers))

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Of recorded routes: its largest number is no expert."""
        return np.uint8 if self.num_experts < 256 else np.uint16

    def chosen(self) -> Tensor:
        """int64 (T, layers, k): the experts of the T rows of the last forward pass."""
        found = [experts for experts in self._chosen if experts is not None]
        if len(found) < self.num_layers:
            raise ModelError("no forward pass has chosen experts", got=f"{len(found)} of {self.num_layers} layers")
        return torch.stack(found, dim=1)

    def replay(self, experts: Tensor | None) -> None:
        """Decide for the routers in the next forward passes, and in what their backward passes compute again.

        Args:
            experts: int64 (T, layers, k) for the T rows of a forward pass, negative in rows where the router decides; None
                leaves all to the routers.

        Raises:
            ModelError: routes of a model of another shape.
        """
        shape, largest = (self.num_layers, self.top_k), -1
        if experts is not None:
            largest = int(experts.max()) if experts.numel() else -1
            if tuple(experts.shape[1:]) != shape or largest >= self.num_experts:
                raise ModelError(
                    "routes do not fit the model",
                    where="training.replay_routes",
                    got=f"{tuple(experts.shape[1:])} (layers, experts a token), up to expert {largest}",
                    expected=f"{shape}, below {self.num_experts}",
                )
        self._given = experts

    def on_routed(self, layer: int, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A router's (logits, gates, experts), with the given experts in place of its own."""
        logits, gates, experts = output
        if self._given is not None:
            given = self._given[:, layer]
            experts = torch.where(given >= 0, given, experts)
            gates = replayed_gates(logits, experts, normalised=self._normalised).to(gates.dtype)
        self._chosen[layer] = experts.detach()
        return logits, gates, experts


class _Hook:
    """A forward hook that does nothing in copies of the module it was made for."""

    def __init__(self, routing: Routing | None, layer: int) -> None:
        self.routing, self._layer = routing, layer

    def __call__(self, router: Any, args: Any, output: Any) -> Any:
        return None if self.routing is None else self.routing.on_routed(self._layer, output)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None, self._layer)


def _normalised(routers: list[Any]) -> bool:
    """How gates follow from logits, which a trial confirms.

    Raises:
        ModelError: in no way that is known here.
    """
    kind = bool(getattr(routers[0], "norm_topk_prob", True))
    if all(_agrees(router, kind) for router in routers):
        return kind
    raise ModelError(
        "the routers of this architecture are not known",
        where="engine.record_routes, training.replay_routes",
        got=type(routers[0]).__name__,
        expected="top-k of a softmax over the experts, as in Qwen3-MoE",
        hint="set engine.record_routes = false and training.replay_routes = false",
    )


@torch.no_grad()
def _agrees(router: Any, normalised: bool) -> bool:
    try:
        weight = router.weight
        trial = torch.linspace(-1, 1, _TRIAL_ROWS * weight.shape[1], dtype=weight.dtype, device=weight.device)
        logits, gates, experts = router.forward(trial.view(_TRIAL_ROWS, -1))
        found = replayed_gates(logits, experts, normalised=normalised)
        same_shapes = experts.shape == (_TRIAL_ROWS, router.top_k) and logits.shape == (_TRIAL_ROWS, router.num_experts)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return same_shapes and torch.allclose(found.float(), gates.float(), atol=1e-5 if weight.dtype.itemsize >= 4 else 1e-2)


def packed_routes(routes: Sequence[tuple[Routes | None, Routes]], lengths: Sequence[int]) -> Tensor:
    """Experts for the rows of packed sequences, int64 (M, layers, k), -1 where the router decides.

    The pass that draws response token t reads the token before it; so routes go to the rows from the last prompt token on, and
    those of the prompt before them. The last response token is not read by any pass that draws one.

    Args:
        routes: of each sequence (P - 1, layers, k) of its prompt, where they are known, and (T, layers, k) of its response.
        lengths: P + T of each sequence.
    """
    out = torch.full((sum(lengths), *routes[0][1].shape[1:]), -1, dtype=torch.int64)
    end = 0
    for (prompt, response), length in zip(routes, lengths, strict=True):
        start, end = end, end + length
        first = end - 1 - len(response)
        out[first : end - 1] = _experts(response)
        if prompt is not None and len(prompt) == first - start:
            out[start:first] = _experts(prompt)
    return out


def _experts(routes: Routes) -> Tensor:
    experts = torch.from_numpy(routes.astype(np.int64))
    return torch.where(experts == np.iinfo(routes.dtype).max, -1, experts)


def padded_routes(routes: Tensor, inside: Tensor) -> Tensor:
    """Experts for the rows of padded sequences, int64 (S * L, layers, k), from those of packed ones; bool (S, L) says where."""
    padded = routes.new_full((*inside.shape, *routes.shape[1:]), -1)
    padded[inside] = routes
    return padded.flatten(0, 1)
