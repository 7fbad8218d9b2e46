"""Packages on the Hugging Face hub: a repository holds the files of one package, a commit is a version."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klas_zoo.addresses import without_credentials
from klas_zoo.errors import KlasZooError, RemoteError, UsageError, first_line
from klas_zoo.exporters.manifest import MANIFEST
from klas_zoo.exporters.manifest_reading import read_manifest
from klas_zoo.exporters.package import SIGNATURE, Package, read_table
from klas_zoo.hub import quick_when_offline
from klas_zoo.sharing.staging import Staging

_PLACE = re.compile(
    r"hf://(?:(?P<kind>models|datasets)/)?(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[\w./-]{1,200}))?/?"
)
_OURS = ("*.onnx", "*.bin", "*.safetensors", "*.plan", "*.engine", "*.cdx.json", "*.sig")
"""Files of a former version that are removed when the new one does not have them; a README stays."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """`hf://owner/name@revision`, of models unless `hf://datasets/…` says otherwise."""

    name: str
    kind: str
    revision: str | None

    @classmethod
    def parse(cls, url: str) -> Repository:
        """
        Raises:
            UsageError: it is none.
        """
        match = _PLACE.fullmatch(url)
        if match is None:
            raise UsageError(
                f"{without_credentials(url)} is no repository of the Hugging Face hub: write hf://owner/name, "
                "hf://datasets/owner/name or either with @revision; credentials come from hf auth login or HF_TOKEN."
            )
        kind = (match["kind"] or "models").removesuffix("s")
        return cls(name=match["repository"], kind=kind, revision=match["revision"])

    def __str__(self) -> str:
        kind = "" if self.kind == "model" else f"{self.kind}s/"
        return f"hf://{kind}{self.name}{f'@{self.revision}' if self.revision else ''}"

    @property
    def place(self) -> dict[str, Any]:
        return {"repo_id": self.name, "repo_type": self.kind}


def push_to_hub(
    package: Package, url: str, on_start: Callable[[int], None], on_bytes: Callable[[int], None]
) -> tuple[Repository, str, int, int]:
    """One commit with all files of the package, in a repository that is made where there is none.

    Returns:
        The repository, the commit, the size of the package in bytes and how many of them were not there before.

    Raises:
        UsageError: the URL is no repository.
        RemoteError: the hub cannot be reached or does not take it; the repository is as before.
    """
    repository = Repository.parse(url)
    sizes = package.shared_files
    on_start(sum(sizes.values()))
    with _speaking(repository, "written") as hub:
        hub.create_repo(**repository.place, exist_ok=True)
        before = hub.repo_info(**repository.place, revision=repository.revision, files_metadata=True)
        known = {one.rfilename: (one.blob_id, one.lfs and one.lfs.sha256) for one in before.siblings or ()}
        sent = sum(
            size for name, size in sizes.items() if not set(_digests(package.folder / name)) & set(known.get(name, ()))
        )
        version = before.sha
        if sent:
            version = hub.upload_folder(
                **repository.place, folder_path=str(package.folder), revision=repository.revision,
                allow_patterns=sorted(sizes), delete_patterns=list(_OURS),
                commit_message=f"{package.manifest.family.name} by klas-zoo",
            ).oid  # fmt: skip
    for size in sizes.values():
        on_bytes(size)
    return repository, str(version), sum(sizes.values()), sent


@dataclass(frozen=True)
class HubPackage:
    """See `klas_zoo.sharing.sources.Source`."""

    repository: Repository
    version: str
    files: Mapping[str, int]
    manifest_sha256: str

    @classmethod
    def find(cls, url: str, name: str | None, version: str | None) -> HubPackage:
        """
        Raises:
            UsageError, RemoteError: see `klas_zoo.sharing.sources.open_source`.
            PackageError: what the repository holds is no package.
        """
        repository = Repository.parse(url)
        if name is not None or version is not None:
            raise UsageError(f"{repository} holds one package: leave out --name, and write @revision for --version.")
        with _speaking(repository, "read") as hub, tempfile.TemporaryDirectory(prefix="klas-zoo-pull-") as temporary:
            found = hub.repo_info(**repository.place, revision=repository.revision, files_metadata=True)
            sizes = {one.rfilename: one.size for one in found.siblings or ()}
            if MANIFEST not in sizes:
                raise RemoteError(f"There is no package at {repository}: klas-zoo push puts one there.")
            hub.hf_hub_download(**repository.place, filename=MANIFEST, revision=found.sha, local_dir=temporary)
            manifest = read_manifest(read_table(Path(temporary))[0], f"{repository}: {MANIFEST}")
            digest = hashlib.sha256((Path(temporary) / MANIFEST).read_bytes()).hexdigest()
        missing = sorted({MANIFEST, *manifest.files} - set(sizes))
        if missing:
            raise RemoteError(f"{repository} lacks {missing[0]}, which its manifest names: push the package again.")
        own = [one for one in (MANIFEST, SIGNATURE) if one in sizes]
        files = {one: int(sizes[one] or 0) for one in (*own, *manifest.files)}
        return cls(repository, str(found.sha), files, digest)

    @property
    def shown(self) -> str:
        return str(self.repository)

    @property
    def name(self) -> str:
        return self.repository.name

    def receive(self, names: Iterable[str], staging: Staging, on_bytes: Callable[[int], None]) -> int:
        """The hub's own client resumes and compares with the hub's digests; the package's are compared later."""
        wanted = list(names)
        place = staging.folder.parent / "hub"  # it keeps notes of its own beside the files
        missing = [one for one in wanted if not (staging.folder / one).is_file()]
        if missing:
            with _speaking(self.repository, "read") as hub:
                hub.snapshot_download(
                    **self.repository.place, revision=self.version, local_dir=str(place), allow_patterns=missing
                )
            for one in missing:
                os.replace(place / one, staging.folder / one)
            shutil.rmtree(place)
        for one in wanted:
            on_bytes(self.files[one])
        return sum(self.files[one] for one in missing)

    def is_copied_to(self, folder: Path) -> bool:
        """The manifest names the SHA-256 of every other file, which were compared before."""
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == self.manifest_sha256


def _digests(path: Path) -> tuple[str, str]:
    """As git names a file, and as its large file storage does."""
    git, plain = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            git.update(piece)
            plain.update(piece)
    return git.hexdigest(), plain.hexdigest()


@contextmanager
def _speaking(repository: Repository, done: str) -> Iterator[Any]:
    """The hub's client; what it raises becomes one sentence."""
    try:
        from huggingface_hub import HfApi, errors
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise RemoteError("The Hugging Face hub needs its client: pip install 'klas-zoo[hf]'.") from error
    disable_progress_bars()
    with quick_when_offline() as online:
        if not online:
            raise RemoteError(f"{repository} cannot be {done}: the Hugging Face hub cannot be reached.")
        try:
            yield HfApi()
        except KlasZooError:
            raise
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise RemoteError(
                f"There is no {repository} that may be {done} here: klas-zoo push makes one; a private one needs "
                "hf auth login or HF_TOKEN."
            ) from error
        except errors.HFValidationError as error:
            raise UsageError(f"{repository} is no repository: {first_line(error)}") from error
        except (TypeError, AttributeError, NameError, AssertionError):
            raise  # bugs
        except Exception as error:  # its transport's errors have no base of their own
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                raise  # a file of ours
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise RemoteError(f"{repository} may not be {done} with this login: run hf auth login.") from error
            what = without_credentials(first_line(error)).rstrip(".")[:200]
            raise RemoteError(f"{repository} cannot be {done}: {what}. Rerun the command to resume.") from error
