"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685) on a frozen policy: y = W x + s B A x, s = alpha / rank.

    training    the layers are those of `peft`, put into a module that shares the base's memory with the one it is made from
    published   for each layer NAME: "NAME.lora_A.weight" (r, in), "NAME.lora_B.weight" (out, r), "NAME.lora_scaling" ()
    engine      `MergedWeights`: W + s B A, from the base as it was loaded, so that nothing adds up over updates
    folder      adapter_config.json and adapter_model.safetensors, as `peft` reads and writes them

A starts random and B at 0: the first policy is the base.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from april.core.errors import ModelError, ResourceError, nearest
from april.models.lora_config import LoraConfig

_NAME = "default"
_A, _B, _SCALING = ".lora_A.weight", ".lora_B.weight", ".lora_scaling"
_PREFIX = "base_model.model."
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_UNREADABLE = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_parameters",
    "fan_in_fan_out",
)


class Adapters:
    """The adapters inside one module.

    Attributes:
        config: their options.
    """

    def __init__(self, module: nn.Module, config: LoraConfig) -> None:
        self.config, self._base = config, str(getattr(module, "name_or_path", ""))
        self._generation: Any = getattr(module, "generation_config", None)
        self._layers: dict[str, Any] = {name: part for name, part in module.named_modules() if hasattr(part, "lora_A")}
        if config.dropout:
            self._drop(0.0)

    @staticmethod
    def of(module: Any) -> Adapters | None:
        """Those of a module that `with_adapters` made, or of a copy of it."""
        config = getattr(module, "april_lora", None)
        return None if config is None else Adapters(module, config)

    def published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What an engine that holds the base needs, from tensors under the module's own names; the same memory."""
        out: dict[str, Tensor] = {}
        for name in self._layers:
            out[name + _A], out[name + _B] = state[f"{name}.lora_A.{_NAME}.weight"], state[f"{name}.lora_B.{_NAME}.weight"]
            out[name + _SCALING] = torch.tensor(self.config.scaling, dtype=torch.float64)
        return out

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the body runs the module is the base."""
        for layer in self._layers.values():
            layer.set_scale(_NAME, 0.0)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.set_scale(_NAME, 1.0)

    @contextmanager
    def dropout(self, seed: int, device: torch.device) -> Iterator[None]:
        """While the body runs inputs of the adapters are left out, which ones `seed` says; nothing where the share is 0."""
        if not self.config.dropout:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._drop(self.config.dropout)
            try:
                yield
            finally:
                self._drop(0.0)

    def _drop(self, share: float) -> None:
        for layer in self._layers.values():
            layer.lora_dropout[_NAME].train(share > 0).p = share

    def save(self, folder: str | Path, published: Mapping[str, Tensor]) -> None:
        """Write them as `peft` does."""
        from safetensors.torch import save_file

        names = sorted({name.rpartition(".")[2] for name in self._layers})
        names = names if self.config.targets == "all" else list(self.config.targets)
        peft_config(self.config, names, self._base or None).save_pretrained(str(folder))
        tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in published.items() if not name.endswith(_SCALING)}
        save_file(tensors, str(Path(folder) / _WEIGHTS_FILE), metadata={"format": "pt"})
        if self._generation is not None:  # names the tokens that end a response
            self._generation.save_pretrained(str(folder))


def peft_config(config: LoraConfig, targets: list[str], base: str | None = None) -> Any:
    """The options as `peft` has them.

    Raises:
        ResourceError: `peft` is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ResourceError(
            "peft cannot be imported",
            where="training.lora",
            got=str(error).splitlines()[0],
            expected="the extra april-rl[lora]",
            hint="pip install -c constraints.txt -e '.[lora]'",
        ) from error
    alpha = int(config.alpha) if config.alpha.is_integer() else config.alpha
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=config.dropout,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def with_adapters(module: Any, config: LoraConfig) -> Any:
    """A module with the same base, in the same memory, and new adapters; the given one is left as it is.

    Raises:
        ModelError: it has adapters already, or lacks a target.
        ResourceError: `peft` is not installed.
    """
    if Adapters.of(module) is not None:
        raise ModelError("a policy with adapters gets no further ones", where="training.lora")
    options = peft_config(config, _targets(module, config))
    from peft import inject_adapter_in_model

    shared = {id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in module.parameters()}
    copied = copy.deepcopy(module, shared)
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same for every device and rank
        torch.manual_seed(config.seed)
        inject_adapter_in_model(options, copied, _NAME)
    copied.april_lora = config
    return copied


def copied_adapters(module: Any) -> Any:
    """A module with adapters of its own, as these are, on the same base in the same memory."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in module.parameters() if not tensor.requires_grad})


def _targets(module: Any, config: LoraConfig) -> list[str]:
    head = module.get_output_embeddings()
    layers = [name for name, part in module.named_modules() if type(part) is nn.Linear and part is not head]
    short = sorted({name.rpartition(".")[2] for name in layers})
    if not layers:
        raise ModelError("a model without linear layers gets no adapters", where="training.lora", got=type(module).__name__)
    if config.targets == "all":
        return short
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise ModelError(
                "no linear layer has this name",
                where="training.lora.targets",
                got=target,
                expected="the name of a linear layer that is not the output layer, or all",
                hint=nearest(target, short),
            )
    return list(config.targets)


# -- the engine's side --------------------------------------------------------------------------------------------------------


def is_adapters(weights: Mapping[str, Any]) -> bool:
    """Whether published weights are adapters, and not a whole model."""
    return any(name.endswith(_A) for name in weights)


@torch.no_grad()
def merged_weight(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + s B A, (out, in), where and in what precision W is; computed in float32 at least. Hu et al. 2021, section 4.1."""
    wide = torch.promote_types(base.dtype, torch.float32)
    a, b = (factor.detach().to(base.device, wide) for factor in (a, b))
    return torch.addmm(base.detach().to(wide), b, a, alpha=scaling).to(base.dtype)


class MergedWeights(Mapping[str, Tensor]):
    """A whole model of a base and published adapters; a layer is merged when it is asked for.

    Args:
        base: Hugging Face name -> tensor; never changed.
        adapters: as published.

    Raises:
        ModelError: an adapter of a layer that the base lacks or that has another shape, or one without all its parts.
    """

    def __init__(self, base: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> None:
        self._base, self._adapters = base, adapters
        self._merged = {name.removesuffix(_A) + ".weight" for name in adapters if name.endswith(_A)}
        unknown = sorted(self._merged - base.keys())
        if unknown:
            raise ModelError(
                "an adapter is of a layer that the base lacks", where="adapters", got=unknown[0], hint=nearest(unknown[0], base)
            )
        for name in sorted(self._merged):
            self._check(name, tuple(base[name].shape))

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        layer = name.removesuffix(".weight")
        missing = [part for part in (_A, _B, _SCALING) if layer + part not in self._adapters]
        if missing:
            raise ModelError("an adapter is not whole", where="adapters", got=f"{layer} without {missing[0]}")
        a, b = self._adapters[layer + _A], self._adapters[layer + _B]
        if (b.shape[0], a.shape[1]) != expected or a.shape[0] != b.shape[1]:
            got = f"{layer}: A {tuple(a.shape)}, B {tuple(b.shape)}"
            raise ModelError(
                "an adapter is of a layer of another shape", where="adapters", got=got, expected=f"weight {expected}"
            )

    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name]
        if name not in self._merged:
            return base
        layer = name.removesuffix(".weight")
        a, b, scaling = (self._adapters[layer + part] for part in (_A, _B, _SCALING))
        return merged_weight(base, a, b, float(scaling))

    def __contains__(self, name: object) -> bool:
        return name in self._base  # without merging it

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


# -- folders ------------------------------------------------------------------------------------------------------------------


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a folder holds adapters and not a whole model."""
    return (Path(path) / _CONFIG_FILE).is_file() and not (Path(path) / "config.json").is_file()


def read_adapter(folder: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The base's folder or name, and the adapters as they would be published.

    Raises:
        ModelError: the folder is damaged, or holds adapters of a kind that April does not merge.
    """
    from safetensors.torch import load_file

    try:
        options = json.loads((Path(folder) / _CONFIG_FILE).read_text())
        tensors = load_file(str(Path(folder) / _WEIGHTS_FILE))
        base, scaling = options["base_model_name_or_path"], options["lora_alpha"] / options["r"]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError("an adapter cannot be read", where=str(folder), got=str(error).splitlines()[0]) from error
    odd = [name for name in _UNREADABLE if options.get(name)] + [name for name in tensors if not name.endswith((_A, _B))]
    if odd or options.get("peft_type") != "LORA" or not base:
        raise ModelError(
            "an adapter of this kind is not read",
            where=str(folder),
            got=odd[0] if odd else f"peft_type {options.get('peft_type')}, base {base}",
            expected="plain LoRA with the path of its base",
            hint="merge it with peft, and give April the merged folder",
        )
    published = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    for name in [name for name in published if name.endswith(_A)]:
        published[name.removesuffix(_A) + _SCALING] = torch.tensor(scaling, dtype=torch.float64)
    return str(base), published
