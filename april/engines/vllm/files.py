"""Weights as files that other processes read: one safetensors file for each version, gone when they have it."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from april.core.errors import ResourceError
from april.core.ids import Version

_MEMORY = Path("/dev/shm")


def named_once(weights: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors to send, where of tied ones (name -> the name under which it is sent) one stands for all."""
    return {name: tensor for name, tensor in weights.items() if tied.get(name) not in weights}


class WeightFiles:
    """A folder of this engine's own for weights under way to its server, or to its workers.

    Args:
        parent: where the folder is made; None for memory that looks like a folder, where the system has it.
    """

    def __init__(self, parent: str | None) -> None:
        where = parent or (_MEMORY if os.access(_MEMORY, os.W_OK) else None)
        self._serial = 0
        name = f"april-weights-{socket.gethostname()}-"
        _sweep(Path(where or tempfile.gettempdir()), name)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}{os.getpid()}-", dir=where))

    def write(self, weights: Mapping[str, torch.Tensor], version: Version) -> str:
        """Write all tensors; returns the path.

        Raises:
            ResourceError: there is no room.
        """
        self._serial += 1
        path = self.folder / f"version-{version}-{self._serial}.safetensors"
        part = path.with_suffix(".part")
        try:
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}, part)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise ResourceError(
                "weights for vLLM cannot be written",
                where="engine.weights_folder",
                got=str(error),
                hint="name a folder with room for the model",
            ) from error
        part.replace(path)
        return str(path)

    def remove(self, path: str) -> None:
        """Whoever reads these weights has them, or will not need them."""
        with suppress(FileNotFoundError):
            Path(path).unlink()

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _sweep(parent: Path, name: str) -> None:
    """Remove the folders of this machine's processes that were killed: one may hold a whole model in memory."""
    for folder in parent.glob(f"{name}*"):
        pid = folder.name.removeprefix(name).partition("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there is one, and it is not ours
        return True
    return True
