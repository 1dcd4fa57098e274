"""Tables of devices and models: vendors' peak figures, and shapes from the models' published configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.errors import RecipeError, choice

GB, TB, TFLOP = 1e9, 1e12, 1e12
Precision = Literal["bf16", "fp8", "nvfp4"]
WEIGHT_BYTES: dict[str, float] = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}
"""Bytes a parameter; nvfp4 is 4 bits and one 8-bit scale for 16 weights."""


class Device(Config):
    """One accelerator."""

    memory_gb: float = Field(gt=0, description="memory in GB")
    bandwidth_tb_s: float = Field(gt=0, description="of its memory, in TB/s")
    bf16_tflops: float = Field(gt=0, description="dense bf16 arithmetic, in TFLOP/s")


class Model(Config):
    """One policy, as far as time is concerned."""

    path: str = Field(description="its name on the Hugging Face hub")
    parameters: float = Field(gt=0, description="of all weights")
    active_parameters: float = Field(gt=0, description="that one token uses")
    layers: int = Field(ge=1, description="transformer blocks")
    width: int = Field(ge=1, description="of the residual stream")
    kv_bytes_per_token: float = Field(gt=0, description="KV of one token over all layers, in bf16")
    experts: int = Field(1, ge=1, description="routed experts a layer; 1: dense")
    experts_per_token: int = Field(1, ge=1, description="routed experts that a token uses")

    @property
    def expert_parameters(self) -> float:
        """Parameters in routed experts: a k-th part of E of them makes total and active differ."""
        if self.experts == 1:
            return 0.0
        return (self.parameters - self.active_parameters) / (1 - self.experts_per_token / self.experts)


def _device(memory_gb: float, bandwidth_tb_s: float, bf16_tflops: float) -> Device:
    return Device(memory_gb=memory_gb, bandwidth_tb_s=bandwidth_tb_s, bf16_tflops=bf16_tflops)


DEVICES: Mapping[str, Device] = {
    "A100": _device(80, 2.04, 312),
    "H100": _device(80, 3.35, 989),
    "H800": _device(80, 3.35, 989),
    "H20": _device(96, 4.0, 148),
    "H200": _device(141, 4.8, 989),
    "MI300X": _device(192, 5.3, 1307),
}


def _dense(path: str, billions: float, layers: int, width: int, kv_heads: int, head_dim: int = 128) -> Model:
    kv_bytes = 2 * 2 * layers * kv_heads * head_dim  # keys and values of two bytes
    return Model(
        path=path,
        parameters=billions * 1e9,
        active_parameters=billions * 1e9,
        layers=layers,
        width=width,
        kv_bytes_per_token=kv_bytes,
    )


def _mixture(
    path: str, billions: float, active: float, layers: int, width: int, kv_bytes: int, experts: int, per_token: int
) -> Model:
    return Model(
        path=path,
        parameters=billions * 1e9,
        active_parameters=active * 1e9,
        layers=layers,
        width=width,
        kv_bytes_per_token=kv_bytes,
        experts=experts,
        experts_per_token=per_token,
    )


MODELS: Mapping[str, Model] = {
    "Qwen2.5-1.5B": _dense("Qwen/Qwen2.5-1.5B", 1.54, 28, 1536, 2),
    "Qwen2.5-7B": _dense("Qwen/Qwen2.5-7B", 7.62, 28, 3584, 4),
    "Qwen2.5-32B": _dense("Qwen/Qwen2.5-32B", 32.8, 64, 5120, 8),
    "Qwen2-VL-72B": _dense("Qwen/Qwen2-VL-72B-Instruct", 72.7, 80, 8192, 8),
    "Qwen3-0.6B": _dense("Qwen/Qwen3-0.6B", 0.6, 28, 1024, 8),
    "Qwen3-1.7B": _dense("Qwen/Qwen3-1.7B", 1.72, 28, 2048, 8),
    "Qwen3-4B": _dense("Qwen/Qwen3-4B", 4.02, 36, 2560, 8),
    "Qwen3-8B": _dense("Qwen/Qwen3-8B", 8.19, 36, 4096, 8),
    "Qwen3-14B": _dense("Qwen/Qwen3-14B", 14.8, 40, 5120, 8),
    "Qwen3-32B": _dense("Qwen/Qwen3-32B", 32.8, 64, 5120, 8),
    "Qwen3-30B-A3B": _mixture("Qwen/Qwen3-30B-A3B", 30.5, 3.3, 48, 2048, 2 * 2 * 48 * 4 * 128, 128, 8),
    "Qwen3-235B-A22B": _mixture("Qwen/Qwen3-235B-A22B", 235, 22, 94, 4096, 2 * 2 * 94 * 4 * 128, 128, 8),
    "Moonlight-16B-A3B": _mixture(
        "moonshotai/Moonlight-16B-A3B", 15.96, 2.24, 27, 2048, 2 * 27 * 576, 64, 6
    ),  # latent attention: 512 + 64 numbers a layer
    "DeepSeek-V3": _mixture("deepseek-ai/DeepSeek-V3", 671, 37, 61, 7168, 2 * 61 * 576, 256, 8),
    "Kimi-K2": _mixture("moonshotai/Kimi-K2-Instruct", 1043, 32.6, 61, 7168, 2 * 61 * 576, 384, 8),
}


def device(name: str, where: str = "cluster.device") -> Device:
    """A device by its name, which stands at `where`.

    Raises:
        RecipeError: an unknown one; names the nearest.
    """
    if name not in DEVICES:
        raise RecipeError("unknown device", where=where, got=name, **choice(name, DEVICES, "take the nearest one"))
    return DEVICES[name]


def model(name: str, where: str = "cluster.model") -> Model:
    """A model by its name, which stands at `where`.

    Raises:
        RecipeError: an unknown one; names the nearest.
    """
    if name not in MODELS:
        raise RecipeError("unknown model", where=where, got=name, **choice(name, MODELS, "take one of its size"))
    return MODELS[name]
