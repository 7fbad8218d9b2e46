"""Signatures of packages by a key, made and checked by the model-signing package (OpenSSF Model Signing).

A signature is a file in the package's folder that its manifest does not name; it covers every other file there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from klas_zoo.errors import MissingPackage, PackageError, UsageError, first_line
from klas_zoo.exporters.package import SIGNATURE, Package
from klas_zoo.files import replacing


def sign(folder: Path, key: Path, *, password: str | None = None) -> Path:
    """Writes a signature into a package, in place of one that is there.

    Args:
        key: a private key on an elliptic curve, PEM.
        password: of the key, where it has one.

    Returns:
        The signature.

    Raises:
        UsageError: the key cannot be read, or is of another kind.
        PackageError: the package is damaged, holds other files, or cannot be written.
    """
    package = Package.open(folder)
    if extra := package.extra_files():
        raise PackageError(f"{package.folder} holds {', '.join(extra[:5])}, which is not of the package: remove it.")
    signing, _, hashing = _library()
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=str(key), password=password)
    except (OSError, ValueError, TypeError) as error:
        raise _no_key(key, "private", error) from error
    target = package.folder / SIGNATURE
    try:
        with replacing(target) as temporary:
            ignored = [str(target), str(temporary)]
            config.set_hashing_config(hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False))
            config.sign(str(package.folder), str(temporary))
    except OSError as error:
        raise PackageError(f"{target} cannot be written: {error.strerror or first_line(error)}.") from error
    return target


def check_signature(folder: Path, key: Path) -> None:
    """
    Args:
        key: the public key, PEM.

    Raises:
        UsageError: the key cannot be read, or is of another kind.
        PackageError: there is no signature, it is of another key, or the package is not what was signed.
    """
    _, verifying, hashing = _library()
    signature = folder / SIGNATURE
    if signature.is_symlink() or not signature.is_file():
        raise PackageError("The package has no signature, and --verify-key asks for one: klas-zoo sign makes it.")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=str(key))
    except (OSError, ValueError, TypeError) as error:
        raise _no_key(key, "public", error) from error
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[str(signature)], ignore_git_paths=False))
    try:
        config.verify(str(folder), str(signature))
    except Exception as error:  # what cryptography raises of a signature that a stranger wrote has no one base
        reason = first_line(error).rstrip(".")[:200] if isinstance(error, ValueError) else "the signature does not fit"
        raise PackageError(f"The package is not what the owner of {key} signed: {reason}.") from error


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise MissingPackage("Signing and checking signatures", error.name or "model-signing", "sign") from error
    os.environ.setdefault("OTEL_SDK_DISABLED", "true")  # no telemetry
    return signing, verifying, hashing


def _no_key(key: Path, kind: str, error: Exception) -> UsageError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error).rstrip(".")
    return UsageError(f"{key} is no {kind} key on an elliptic curve in PEM ({why}).")
