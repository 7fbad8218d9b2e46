"""Reading a family package: one folder, one weights file, one engine a route, everything checked.

Nothing of a package is executed, and nothing outside of its folder is read: names are plain file
names, files are regular files and no links, graphs read weights from the one weights file only,
and tensors beside ONNX are safetensors. Imports neither torch nor onnxruntime.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.errors import DamagedPackage, PackageError, UnknownName
from klas_zoo.exporters.manifest import GRAPH_FORMATS, MANIFEST, Manifest, PackagedRoute, read_manifest
from klas_zoo.files import replacing, sha256_of

if TYPE_CHECKING:
    import numpy as np

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
    """A package whose files were checked by `open`."""

    folder: Path
    manifest: Manifest

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
        folder = Path(folder)
        package = cls(folder, read_manifest(read_table(folder), str(folder / MANIFEST)))
        package.check(content=content)
        return package

    def check(self, *, content: bool) -> None:
        """What `open` does when the manifest has been read.

        Raises:
            DamagedPackage, PackageError: as `open`.
        """
        for name in self.manifest.files:
            self._check_file(name, content)
        self._check_contents()

    @property
    def routes(self) -> tuple[PackagedRoute, ...]:
        """Cheapest first."""
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

    def _check_file(self, name: str, content: bool) -> None:
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


def read_table(folder: Path) -> Any:
    """What `manifest.json` holds, unchecked.

    Raises:
        DamagedPackage: it is no regular file, or not JSON.
        PackageError: there is no package in that folder.
    """
    if not os.path.lexists(folder / MANIFEST):
        raise PackageError(f"{folder} is no package: it has no {MANIFEST}.")
    return _json(_regular(folder / MANIFEST))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` last, when every file it names is there.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n"
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MOST_MANIFEST_BYTES:
            raise DamagedPackage(f"{path} is too large for a manifest.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DamagedPackage(f"{path} is not JSON ({error}).") from error


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
