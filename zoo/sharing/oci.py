"""Packages in OCI registries."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from klas_zoo.errors import PackageError, RemoteError, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.files import sha256_of
from klas_zoo.sharing.modelpack import (
    MOST_MANIFEST_BYTES,
    Artifact,
    artifact_of,
    config_of,
    digest_of,
    read_artifact,
)
from klas_zoo.sharing.registries import OciRegistry, Reference
from klas_zoo.sharing.staging import Staging


def push_to_registry(
    package: Package, url: str, on_start: Callable[[int], None], on_bytes: Callable[[int], None]
) -> tuple[Reference, str, int, int]:
    """Blobs first, then the manifest, which moves the tag.

    Returns:
        The reference, the digest of the manifest, the size of the package in bytes and how many of them were sent.

    Raises:
        UsageError: the URL is no reference that something can be pushed to.
        RemoteError: the registry does not take it; the tag then is where it was.
        PackageError: a file changed meanwhile.
    """
    reference = Reference.parse(url)
    if reference.digest:
        raise UsageError(f"{reference} names a digest, which follows from the package: push to a tag.")
    manifest, folder = package.manifest, package.folder
    try:
        own = {name: (folder / name).read_bytes() for name in set(package.shared_files) - set(manifest.files)}
    except OSError as error:
        raise PackageError(f"{folder} cannot be read: {error.strerror}.") from error
    files = {name: (f"sha256:{one.sha256}", one.size_bytes) for name, one in manifest.files.items()}
    files |= {name: (digest_of(content), len(content)) for name, content in own.items()}
    config = config_of(manifest, {name: digest for name, (digest, _) in files.items()})
    artifact = artifact_of(manifest, files, config)
    if len(artifact) > MOST_MANIFEST_BYTES:
        raise PackageError(f"{folder} has too many files for an OCI manifest of {MOST_MANIFEST_BYTES} bytes.")
    registry = OciRegistry(reference)
    on_start(sum(size for _, size in files.values()))
    sent = 0
    for name, (digest, size) in sorted(files.items()):
        if registry.write_blob(folder / name, digest, size):
            sent += size
        on_bytes(size)
    with tempfile.TemporaryDirectory(prefix="klas-zoo-push-") as temporary:
        path = Path(temporary) / "config.json"
        path.write_bytes(config)
        registry.write_blob(path, digest_of(config), len(config))
    registry.write_manifest(artifact, reference.place)
    return reference, digest_of(artifact).removeprefix("sha256:"), sum(size for _, size in files.values()), sent


@dataclass(frozen=True)
class RegistryPackage:
    """See `klas_zoo.sharing.sources.Source`."""

    registry: OciRegistry
    version: str
    artifact: Artifact

    @classmethod
    def find(cls, url: str, name: str | None, version: str | None) -> RegistryPackage:
        """
        Raises:
            UsageError, RemoteError: see `klas_zoo.sharing.sources.open_source`.
        """
        reference = Reference.parse(url)
        if name is not None or version is not None:
            raise UsageError(f"{reference} says which package it is: leave out --name and --version.")
        registry = OciRegistry(reference)
        content = registry.manifest(reference.place, MOST_MANIFEST_BYTES)
        if content is None:
            raise RemoteError(f"There is no package at {reference}: klas-zoo push puts one there.")
        return cls(registry, hashlib.sha256(content).hexdigest(), read_artifact(content, str(reference)))

    @property
    def shown(self) -> str:
        return str(self.registry.reference)

    @property
    def name(self) -> str:
        return self.registry.reference.name

    @property
    def files(self) -> Mapping[str, int]:
        return {name: layer.size for name, layer in self.artifact.files.items()}

    def receive(self, names: Iterable[str], staging: Staging, on_bytes: Callable[[int], None]) -> int:
        """Every file is compared with its digest; what is there of one already is not fetched."""
        received = 0
        for name in names:
            layer = self.artifact.files[name]
            with staging.open(name) as output:
                received += self.registry.read_blob(layer.digest, layer.size, output)
                output.flush()
                os.fsync(output.fileno())
            on_bytes(layer.size)
        return received

    def is_copied_to(self, folder: Path) -> bool:
        return all(
            f"sha256:{sha256_of(folder / name)}" == layer.digest for name, layer in self.artifact.files.items()
        )
