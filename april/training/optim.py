"""The optimiser: AdamW over a module's parameters, and one guarded step of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from april.core.errors import ModelError
from april.training.config import AdamConfig


def adamw(parameters: Iterable[nn.Parameter], config: AdamConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def clip_gradients(gradients: list[Tensor], max_norm: float) -> float:
    """Scale all gradients down to `max_norm` in total; returns their norm before, nan or inf when one is not finite."""
    if not gradients:
        return 0.0
    norm = float(_norm(gradients))
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of gradients that lie in parts on several ranks


def guarded_step(optimizer: torch.optim.Optimizer, max_norm: float, where: str) -> float:
    """Clip the gradients and take one optimiser step; returns their norm before.

    Raises:
        ModelError: a gradient is not finite; no step was taken.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = clip_gradients(gradients, max_norm)
    if not math.isfinite(norm):
        raise ModelError(
            "the gradient is not finite",
            where=where,
            got=norm,
            hint="lower the learning rate (training.lr), or set training.nonfinite = 'skip'",
        )
    optimizer.step()
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
