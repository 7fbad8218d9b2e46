"""`klas-zoo verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from klas_zoo.cli.options import json_option


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), help="Threads of onnxruntime. Default: one for each physical core.")
@json_option
def verify(package: Path, threads: int | None, as_json: bool) -> None:
    """Check the folder PACKAGE: every hash, every graph by onnx's checker, every route against its stored answers."""
    from klas_zoo.errors import VerificationError
    from klas_zoo.exporters.checking import verify_package

    verdicts = verify_package(package, threads=threads)
    if as_json:
        click.echo(json.dumps([one.to_json() for one in verdicts], sort_keys=True))
    else:
        from klas_zoo.cli.package_tables import verdicts_table
        from klas_zoo.cli.tables import show

        show(verdicts_table(verdicts))
    refused = [one for one in verdicts if one.status == "refused"]
    if refused:
        raise VerificationError(f"{package}: {refused[0].artifact.route} failed to verify. {refused[0].reason}")
