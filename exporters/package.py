"""Reading a family package: one folder, one weights file, one engine a route, everything checked.

Nothing of a package is executed, and nothing outside of its folder is read: names are plain file
names, files are regular files and no links, graphs read weights from the one weights file only,
and tensors beside ONNX are safetensors. Imports neither torch nor onnxruntime.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.addresses import local_path
from klas_zoo.errors import DamagedPackage, PackageError, UnknownName
from klas_zoo.exporters.hub_cache import without_links
from klas_zoo.exporters.manifest import (
    FIRST_SEALED_SCHEMA,
    GRAPH_FORMATS,
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    PackagedRoute,
    manifest_text,
)
from klas_zoo.exporters.manifest_reading import read_manifest
from klas_zoo.files import replacing, sha256_of, unsealed
from klas_zoo.reading import schema_of
from klas_zoo.units import format_size

if TYPE_CHECKING:
    import numpy as np

LARGEST_BYTES = 256 * 10**9
"""Of a package. Reading one that claims more, perhaps in files that are mostly holes, would take hours."""
SIGNATURE = "package.sig"
"""Of a signed package: of every other file, so that the manifest cannot name it (`klas_zoo.sharing.signatures`)."""
_MOST_FILES = 100_000
_MOST_MANIFEST_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class References:
    """Real images and what the fp32 torch routes answer to them.

    Attributes:
        images: (N, C, H, W), float32, as the network takes them.
        logits: by the route's name, (N, classes), float32.
    """

    images: np.ndarray
    logits: dict[str, np.ndarray]


@dataclass(frozen=True)
class Package:
    """A package whose files were checked by `open`.

    Attributes:
        digest: the SHA-256 of its manifest, which has those of all other files.
    """

    folder: Path
    manifest: Manifest
    digest: str = ""

    @classmethod
    def open(cls, folder: Path | str, *, content: bool = True) -> Package:
        """Checks a package and opens it.

        Args:
            content: compare the SHA-256 of every file too, not only its size.

        Raises:
            NewerPackage: a newer klas-zoo wrote it.
            DamagedPackage: a file is missing, altered, cut short, a link, or reaches outside.
            PackageError: there is no package in that folder.
        """
        folder = without_links(local_path(folder, "a package"))
        table, digest = read_table(folder)
        package = cls(folder, read_manifest(table, str(folder / MANIFEST)), digest)
        package.check(content=content)
        return package

    def check(self, *, content: bool) -> None:
        """What `open` does when the manifest has been read.

        Raises:
            DamagedPackage, PackageError: as `open`.
        """
        size = sum(one.size_bytes for one in self.manifest.files.values())
        if size > LARGEST_BYTES or len(self.manifest.files) > _MOST_FILES:
            raise DamagedPackage(
                f"{self.folder / MANIFEST} names {len(self.manifest.files)} files of {format_size(size)}: packages "
                f"have at most {_MOST_FILES} and {format_size(LARGEST_BYTES)}."
            )
        for name in self.manifest.files:
            self.check_file(name, content=content)
        self._check_contents()

    def extra_files(self) -> list[str]:
        """What lies in the folder and is not part of the package, sorted. Nothing of it is read."""
        known = {MANIFEST, SIGNATURE, *self.manifest.files}
        return sorted(name for name in os.listdir(self.folder) if name not in known)

    @property
    def shared_files(self) -> dict[str, int]:
        """What goes where the package goes: size in bytes by name of the manifest, its files and the signature."""
        own = [name for name in (MANIFEST, SIGNATURE) if (self.folder / name).is_file()]
        sizes = {name: (self.folder / name).stat().st_size for name in own}
        return sizes | {name: one.size_bytes for name, one in self.manifest.files.items()}

    @property
    def routes(self) -> tuple[PackagedRoute, ...]:
        """Smallest first."""
        return self.manifest.routes

    def route(self, name: str) -> PackagedRoute:
        """
        Raises:
            UnknownName: the package has no such route; the message names the nearest.
        """
        for one in self.routes:
            if one.name == name:
                return one
        raise UnknownName("route", name, [one.name for one in self.routes])

    def engine(self, route: PackagedRoute) -> Path:
        """The file of a route.

        Raises:
            PackageError: this format has no file for each route.
        """
        if route.file is None:
            raise PackageError(f"The {self.manifest.format} package {self.folder} has no engine for each route.")
        return self.folder / route.file

    @property
    def weights(self) -> Path:
        """The one file that holds the weights of all routes.

        Raises:
            PackageError: each engine of this format holds its own.
        """
        if self.manifest.weights is None:
            raise PackageError(f"The {self.manifest.format} package {self.folder} has no weights file.")
        return self.folder / self.manifest.weights

    def references(self) -> References:
        """
        Raises:
            DamagedPackage: they are no safetensors file, or not of this package's routes.
        """
        tensors = _safetensors(self.folder / self.manifest.references)
        images = tensors.pop("images", None)
        family = self.manifest.family
        if images is None or images.ndim != 4 or images.shape[1:] != family.input_shape or not len(images):
            raise DamagedPackage(f"{self.folder / self.manifest.references} holds no images {family.input_shape}.")
        logits = {name.removeprefix("logits/"): tensor for name, tensor in tensors.items()}
        for one in self.routes:
            if one.name not in logits or logits[one.name].shape != (len(images), family.num_classes):
                raise DamagedPackage(
                    f"{self.folder / self.manifest.references} holds no answers of the route {one.name}."
                )
        return References(images=images, logits=logits)

    def check_file(self, name: str, *, content: bool) -> None:
        """One file of the manifest: that it is there, its size, and with `content` its SHA-256.

        Raises:
            DamagedPackage, PackageError: as `open`.
        """
        entry, path = self.manifest.files[name], self.folder / name
        size = _regular(path).stat().st_size
        if size != entry.size_bytes:
            cut = "is cut short" if size < entry.size_bytes else "is too long"
            raise DamagedPackage(f"{path} {cut}: {size} bytes, {entry.size_bytes} were written. Copy it again.")
        if content and _hash(path) != entry.sha256:
            raise DamagedPackage(f"{path} is not the file that was written: its SHA-256 is another. Copy it again.")

    def _check_contents(self) -> None:
        """What the hashes of a package that somebody made on purpose do not tell."""
        if self.manifest.format == "torch":
            _safetensors_header(self.weights)
        if self.manifest.format in GRAPH_FORMATS:
            from klas_zoo.exporters.graphs import check_graph

            for one in self.routes:
                check_graph(self.engine(one), self.weights)
            from klas_zoo.exporters.packaged_cascades import read_cascades

            read_cascades(self)


def read_table(folder: Path) -> tuple[Any, str]:
    """What `manifest.json` holds, unchecked but for its own SHA-256; and the SHA-256 of the file.

    Raises:
        DamagedPackage: it is no regular file, not JSON, or not what was written.
        PackageError: there is no package in that folder.
    """
    folder = local_path(folder, "a package")
    if not os.path.lexists(folder / MANIFEST):
        raise PackageError(f"{folder} is no package: it has no {MANIFEST}.")
    path = _regular(folder / MANIFEST)
    content = _content(path)
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedPackage(f"{path} is not JSON ({error}).") from error
    # schema 1 had no sum; what is newer than this version is refused by whoever reads on
    if FIRST_SEALED_SCHEMA <= (schema_of(table) or 0) <= SCHEMA_VERSION and unsealed(content) is None:
        raise not_as_written(path)
    return table, hashlib.sha256(content).hexdigest()


def not_as_written(path: Path) -> DamagedPackage:
    """Of a manifest whose own SHA-256 is another."""
    return DamagedPackage(f"{path} is not the manifest that was written: its SHA-256 is another. Copy it again.")


def _with_bom(folder: Path, manifest: Manifest) -> Manifest:
    """A manifest that names the bill of materials, which is written beside it where [build] is installed."""
    from klas_zoo.exporters.bom import BOM, bom_of

    if find_spec("cyclonedx") is None:
        return manifest
    with replacing(folder / BOM) as temporary:
        temporary.write_text(bom_of(manifest), encoding="utf-8")
        entry = FileEntry(size_bytes=temporary.stat().st_size, sha256=sha256_of(temporary))
    return replace(manifest, files={**manifest.files, BOM: entry})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the bill of materials, and `manifest.json` last, when every file it names is there.

    Raises:
        OSError: it cannot be written.
    """
    manifest = _with_bom(folder, manifest)
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(manifest_text(manifest), encoding="utf-8")


def _regular(path: Path) -> Path:
    """The path itself, if a regular file stands there."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise DamagedPackage(f"{path} is missing: {error.strerror}. Copy the package again.") from error
    if stat.S_ISLNK(mode):
        raise DamagedPackage(f"{path} is a link; a package holds regular files only.")
    if not stat.S_ISREG(mode):
        raise DamagedPackage(f"{path} is no regular file.")
    return path


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_MANIFEST_BYTES:
            raise DamagedPackage(f"{path} is too large for a manifest.")
        return path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}.") from error


def _hash(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}.") from error


def _safetensors_header(path: Path) -> None:
    import safetensors

    try:
        with safetensors.safe_open(path, "np"):
            pass
    except Exception as error:  # also OSError, and what its Rust part raises
        raise _no_safetensors(path, error) from error


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise _no_safetensors(path, error) from error


def _no_safetensors(path: Path, error: Exception) -> DamagedPackage:
    return DamagedPackage(f"{path} is no safetensors file ({error}), and nothing else is read as weights.")
