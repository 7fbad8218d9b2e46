"""`klas-zoo install`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.addresses import without_credentials
from klas_zoo.cli.options import LocalPath, Number, counts, json_option, max_size_option, registry_option
from klas_zoo.cli.output import say, say_json

if TYPE_CHECKING:
    from klas_zoo.progress.listeners import Advance


@click.command()
@click.argument("package")
@click.option("--device", default="cpu", show_default=True, help="What the engines run on and are timed on.")
@click.option("--runtime", "runtimes", help="What executes them, for example onnxruntime,openvino. Default: the package's own; of ONNX graphs onnxruntime, and TensorRT on an NVIDIA GPU.")
@click.option("--batch", "batches", callback=counts, default="1", show_default=True, metavar="N[,N...]", help="Batch sizes to time them at.")
@click.option("--threads", type=click.IntRange(min=1), help="That compute one operator. Default: one for each physical core.")
@click.option("--data", help="Measure accuracies on these images instead of taking those of the package.")
@click.option("--name", help="Of the package at a URL.")
@click.option("--version", help="First digits of a version at a URL. Default: the one pushed last.")
@max_size_option
@click.option("--verify-key", type=LocalPath(dir_okay=False), help="Public key, PEM: refuse a package that its owner did not sign with klas-zoo sign.")
@click.option("--timeout", "timeout_s", type=Number(min=0), metavar="SECONDS", help="Stop after that time. Default: never.")
@click.option("--dry-run", is_flag=True, help="Check the package's files, and change nothing.")
@registry_option
@json_option
def install(package: str, runtimes: str | None, as_json: bool, dry_run: bool, timeout_s: float | None, **options: Any) -> None:
    """Bring a package's engines into this machine's registry: verify, compile where needed, time, register.

    PACKAGE is a folder, or a URL as klas-zoo pull takes it. A package that is registered already, and was measured under
    the same conditions, is left as it is.
    """
    from klas_zoo.catalogue.installing import install as install_package

    chosen = tuple(dict.fromkeys(name.strip() for name in runtimes.split(","))) if runtimes else None
    options |= {"runtimes": chosen, "dry_run": dry_run, "listener": _report, "stage": _stage}
    if timeout_s:
        from klas_zoo.limited import within

        shown = without_credentials(package)
        done = within(timeout_s, f"Installing {shown}", install_package, package, **options)
    else:
        done = install_package(package, **options)
    if as_json:
        say_json({**vars(done), "dry_run": dry_run})
        return
    for name in done.engines:
        say(f"{done.family}: {name}")
    for reason in done.refused:
        say(f"not installed: {reason}")
    if done.already:
        say(f"Registered already, as build {done.build_id}.")
    elif dry_run:
        say(f"Nothing was changed; package {done.digest[:12]} would be installed.")
    else:
        say(f"Registered as build {done.build_id}.")


def _report(sentence: str) -> None:
    say(f"{sentence} …", err=True)


def _stage(name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """A bar in a terminal, a line now and then elsewhere; a function of this module, as it goes to another process."""
    from rich.console import Console

    from klas_zoo.progress.console import ConsoleListener

    return ConsoleListener(Console(stderr=True)).stage(name, total, unit)
