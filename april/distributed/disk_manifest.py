"""What a version on the disk is made of: for each tensor its file, and the digest of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from april.core.errors import DataError
from april.core.ids import Version

SCHEMA = 1
HINT = "check the file system; `april train --resume FOLDER` writes all weights anew"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a version is made of.

    Attributes:
        version: of the weights.
        session: of the run that wrote it; another one's versions do not count.
        files: name of the file that holds a tensor's value, by tensor.
        digests: SHA-256 of a tensor's bytes, by tensor.
        sizes: bytes of each file.
    """

    version: Version
    session: str
    files: Mapping[str, str]
    digests: Mapping[str, str]
    sizes: Mapping[str, int]

    def to_json(self) -> str:
        """As it is written."""
        tensors = {name: [file, self.digests[name]] for name, file in self.files.items()}
        record = {"schema": SCHEMA, "version": self.version, "session": self.session, "files": self.sizes, "tensors": tensors}
        return json.dumps(record, indent=0)

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read one.

        Raises:
            DataError: it is damaged, or of another schema.
        """
        try:
            record = json.loads(path.read_bytes())
            if record["schema"] != SCHEMA:
                raise ValueError(f"schema {record['schema']}, this version reads {SCHEMA}")
            tensors = record["tensors"]
            return Manifest(
                version=int(record["version"]),
                session=str(record["session"]),
                files={name: str(file) for name, (file, _) in tensors.items()},
                digests={name: str(digest) for name, (_, digest) in tensors.items()},
                sizes={str(name): int(size) for name, size in record["files"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                "the manifest of published weights is damaged",
                where=str(path),
                got=f"{type(error).__name__}: {error}",
                expected="a whole file, as the trainer wrote it",
                hint=HINT,
            ) from error


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes; numbers that are equal but have other bits, such as 0 and -0, differ."""
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(whole.view(torch.uint8).numpy().data if whole.numel() else b"").hexdigest()
