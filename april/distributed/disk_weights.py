"""Weights as files in a folder that trainer and engines can see: only tensors that changed are written, and only they are read.

    FOLDER/weights-000012-9f3c51d2-0.safetensors    tensors whose newest value came with version 12
    FOLDER/version-000012.json                      of every tensor: its file, and the SHA-256 of its bytes

A version exists when its manifest does: that is written beside, made whole, and renamed. The two newest versions stay; a
file that neither names is removed. A reader keeps the tensors that it has and reads those whose file is another one, so it
is the same for a new reader (everything), one that is up to date, and one that has missed versions.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from april.core.errors import DataError, ProcessError, ResourceError
from april.core.ids import Version
from april.distributed.disk_manifest import HINT, Manifest, digest_of
from april.distributed.layout import Layout
from april.distributed.safetensors_file import TensorFile
from april.distributed.transport import Moved, NotYet, PublishedWeights, Transfers

NUM_KEPT = 2
"""Versions: the one that is served, and the next."""
MOST_BYTES = 3
"""Once the named files hold this many times the weights, the next version is written whole."""
_OURS = re.compile(r"(weights-\d+-[0-9a-f]+-\d+\.safetensors|version-\d+\.json)(\.draft)?")


class DiskWeights(Transfers):
    """See `WeightTransport`.

    Args:
        folder: visible to all processes; made by the first write.
        layout: of the tensors.
        file_bytes: largest file, unless one tensor is larger.
        fsync: force each version to the disk before it counts as written.
        session: of the run; a new one when left out.
    """

    name = "disk"
    outlives_writer = True

    def __init__(
        self, folder: Path, layout: Layout, *, file_bytes: int = 64 << 20, fsync: bool = False, session: str | None = None
    ) -> None:
        super().__init__()
        self.folder, self.layout, self.file_bytes, self.fsync = folder.absolute(), layout, file_bytes, fsync
        self.session = session or secrets.token_hex(8)
        self._have: tuple[Mapping[str, str], Mapping[str, Tensor]] = ({}, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attached, (self.folder, self.layout, self.file_bytes, self.fsync, self.session))

    # -- what there is ------------------------------------------------------------------------------------------------

    def _path(self, version: Version) -> Path:
        return self.folder / f"version-{version:06d}.json"

    def _manifest(self, version: Version) -> Manifest | None:
        """Of a version of this session; None when there is none."""
        with suppress(FileNotFoundError):
            manifest = Manifest.read(self._path(version))
            return manifest if manifest.session == self.session else None
        return None

    def _manifests(self) -> list[Manifest]:
        """Of all versions of this session, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in sorted(self.folder.glob("version-*.json")):
            with suppress(FileNotFoundError, DataError):
                found.append(Manifest.read(path))
        return sorted((one for one in found if one.session == self.session), key=lambda one: one.version)

    def holds(self, version: Version) -> bool:
        """Whether the version's manifest is there, and can be read: a damaged one was left by another session."""
        with suppress(DataError):
            return self._manifest(version) is not None
        return False

    def passed(self, version: Version) -> bool:
        """Whether there are newer versions, and this one is not kept any more."""
        known = [manifest.version for manifest in self._manifests()]
        return bool(known) and version not in known and known[-1] > version

    def same(self, weights: Mapping[str, Tensor], version: Version) -> bool:
        """Whether these weights have the bytes of a version that was written."""
        manifest = self._manifest(version)
        return manifest is not None and {name: digest_of(tensor) for name, tensor in weights.items()} == manifest.digests

    # -- writing ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor], version: Version) -> Moved:
        """Write the tensors that differ from those of the newest version, then the manifest.

        Raises:
            ProcessError: they are not the tensors of the policy.
            ResourceError: the folder cannot be written to.
        """
        start_s = time.perf_counter()
        self.layout.check(weights)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            num_bytes = self._write(weights, version)
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                "new weights could not be written",
                where=str(self.folder),
                got=error,
                expected=f"room for {(NUM_KEPT + 1) * self.layout.num_bytes / 2**20:.0f} MiB",
                hint='free some room, or set publishing.folder or publishing.transport = "shared_memory"',
            ) from error
        return Moved(time.perf_counter() - start_s, num_bytes)

    def _write(self, weights: Mapping[str, Tensor], version: Version) -> int:
        kept = self._manifests()
        self._remove_others(kept)
        former = kept[-1] if kept else None
        if former is not None and sum(former.sizes.values()) > MOST_BYTES * self.layout.num_bytes:
            former = None
        digests = {name: digest_of(tensor) for name, tensor in weights.items()}
        changed = [name for name in weights if former is None or former.digests.get(name) != digests[name]]
        files = {} if former is None else {name: file for name, file in former.files.items() if name not in changed}
        sizes = {} if former is None else dict(former.sizes)
        mark, num_bytes = secrets.token_hex(4), 0
        for part, names in enumerate(self._parts(changed)):
            file = f"weights-{version:06d}-{mark}-{part}.safetensors"
            self._put_tensors(file, {name: weights[name] for name in names})
            sizes[file] = (self.folder / file).stat().st_size
            num_bytes += sizes[file]
            files |= dict.fromkeys(names, file)
        named = set(files.values())
        manifest = Manifest(version, self.session, files, digests, {name: size for name, size in sizes.items() if name in named})
        self._put(self._path(version), manifest.to_json().encode())
        self._remove_others([one for one in [*kept, manifest] if one.version != version or one is manifest][-NUM_KEPT:])
        return num_bytes

    def _parts(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Names in order, cut so that no file is larger than it may be."""
        part: list[str] = []
        size = 0
        for name in names:
            more = self.layout.places[name].num_bytes
            if part and size + more > self.file_bytes:
                yield part
                part, size = [], 0
            part.append(name)
            size += more
        if part:
            yield part

    def _put_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        draft = self.folder / f"{file}.draft"
        # clones where two names share memory, which the format refuses; elsewhere no copy is made on a CPU
        seen: set[int] = set()
        plain = {}
        for name, tensor in tensors.items():
            whole = tensor.detach().cpu().contiguous()
            plain[name] = whole.clone() if whole.untyped_storage().data_ptr() in seen else whole
            seen.add(whole.untyped_storage().data_ptr())
        save_file(plain, draft)
        self._settle(draft, self.folder / file)

    def _put(self, path: Path, content: bytes) -> None:
        draft = path.with_name(f"{path.name}.draft")
        draft.write_bytes(content)
        self._settle(draft, path)

    def _settle(self, draft: Path, path: Path) -> None:
        """Give a whole file its name."""
        if self.fsync:
            _sync(draft)
        os.replace(draft, path)
        if self.fsync:
            _sync(self.folder)

    def _remove_others(self, kept: Sequence[Manifest]) -> None:
        """Files of ours that no kept manifest names: of older versions, of a writer that died, of an earlier session."""
        named = {self._path(one.version).name for one in kept} | {file for one in kept for file in one.sizes}
        for path in self.folder.iterdir():
            if path.name not in named and _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)

    # -- reading ------------------------------------------------------------------------------------------------------

    def view(self, version: Version) -> PublishedWeights:
        """A version that is there; its files are read where its tensors are looked at."""
        if not self.holds(version):
            raise self._missing(version, ProcessError)
        weights = PublishedWeights(self, version, lambda: load())

        def load() -> Mapping[str, Tensor]:
            tensors, weights.num_bytes = self._read(version)
            return tensors

        return weights

    @contextmanager
    def reading(self, version: Version) -> Iterator[PublishedWeights]:
        """All tensors of a version; those that this reader has already are not read again.

        Raises:
            NotYet: its manifest, or one of its files, is not to be seen, perhaps not yet.
            DataError: a file is damaged or incomplete.
        """
        tensors, num_bytes = self._read(version)
        yield PublishedWeights(self, version, lambda: tensors, num_bytes)

    def _read(self, version: Version) -> tuple[Mapping[str, Tensor], int]:
        manifest = self._manifest(version)
        if manifest is None:
            raise self._missing(version, NotYet)
        if manifest.files.keys() != self.layout.places.keys():
            self.layout.check(manifest.files)
        have_files, have = self._have
        tensors = {name: have[name] for name, file in manifest.files.items() if have_files.get(name) == file}
        wanted: dict[str, list[str]] = {}
        for name, file in manifest.files.items():
            if name not in tensors:
                wanted.setdefault(file, []).append(name)
        try:
            for file, names in wanted.items():
                self._read_file(file, names, manifest, tensors)
        except FileNotFoundError as error:
            raise NotYet(
                "a file of published weights is not there",
                where=f"version {version}",
                got=str(error.filename),
                expected="every file that its manifest names",
                hint="a version that others have passed is removed; else the file system is late, or the folder was cleared",
            ) from error
        self._have = (manifest.files, tensors)
        read = sum(self.layout.places[name].num_bytes for names in wanted.values() for name in names)
        return {name: tensors[name] for name in manifest.files}, read

    def _read_file(self, file: str, names: Sequence[str], manifest: Manifest, into: dict[str, Tensor]) -> None:
        with TensorFile(self.folder / file, manifest.sizes[file], hint=HINT) as tensors:
            for name in names:
                place = self.layout.places[name]
                into[name] = tensors.read(name, place.shape, place.dtype)
                if (found := digest_of(into[name])) != manifest.digests[name]:
                    raise tensors.damaged(name, f"SHA-256 {found[:16]}...", f"SHA-256 {manifest.digests[name][:16]}...")

    def _missing(self, version: Version, kind: type[ProcessError]) -> ProcessError:
        return kind(
            "a version of the weights is not on the disk",
            where=str(self._path(version)),
            got=f"versions {[manifest.version for manifest in self._manifests()]}",
            expected="a version that was written whole, by this run",
            hint="can the trainer's and the engine's process see the same publishing.folder?",
        )

    # -- for all processes --------------------------------------------------------------------------------------------

    def reader(self, name: str) -> DiskWeights:
        """Every process reads the same folder."""
        return self

    def gone(self, name: str) -> None:
        """Nobody waits for a reader."""

    def close(self) -> None:
        """Remove the files: the checkpoints have the weights."""
        if self.folder.is_dir():
            with suppress(OSError):
                self._remove_others([])
                self.folder.rmdir()


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _attached(folder: Path, layout: Layout, file_bytes: int, fsync: bool, session: str) -> DiskWeights:
    return DiskWeights(folder, layout, file_bytes=file_bytes, fsync=fsync, session=session)
