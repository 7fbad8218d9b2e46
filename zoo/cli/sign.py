"""`klas-zoo sign`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from klas_zoo.cli.options import LocalPath
from klas_zoo.cli.output import say


@click.command()
@click.argument("package", type=LocalPath())
@click.option("--key", type=LocalPath(dir_okay=False), required=True, help="Private key on an elliptic curve, PEM. $KLAS_ZOO_KEY_PASSWORD: its password, if it has one.")
def sign(package: Path, key: Path) -> None:
    """Write a signature into the folder PACKAGE, which install --verify-key checks on a target.

    Keys: openssl ecparam -genkey -name prime256v1 -noout -out key.pem, and openssl ec -in key.pem -pubout -out key.pub.
    """
    from klas_zoo.sharing.signatures import sign as sign_package

    say(sign_package(package, key, password=os.environ.get("KLAS_ZOO_KEY_PASSWORD")))
