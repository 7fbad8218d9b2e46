"""`klas-zoo verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from klas_zoo.cli.options import LocalPath, Number, json_option
from klas_zoo.cli.output import say, say_json

if TYPE_CHECKING:
    from klas_zoo.exporters.checking import PackageReport


@click.command()
@click.argument("package", type=LocalPath())
@click.option("--threads", type=click.IntRange(min=1), help="Threads of onnxruntime. Default: one for each physical core.")
@click.option("--timeout", "timeout_s", type=Number(min=0), default=3600, show_default=True, metavar="SECONDS", help="Stop after that time; 0: never.")
@click.option("--allow-edited-config", is_flag=True, help="Of a repository for Triton: take every config.pbtxt as it is.")
@json_option
def verify(package: Path, threads: int | None, timeout_s: float, allow_edited_config: bool, as_json: bool) -> None:
    """Check the folder PACKAGE: every hash, every graph by onnx's checker, every route against its stored answers.

    Of a repository that export --format triton wrote, everything that is served is checked too.
    """
    from klas_zoo.limited import within

    limited = within(timeout_s, f"Verifying {package}", _report, package, threads, allow_edited_config) if timeout_s else None
    found = _report(package, threads, allow_edited_config) if limited is None else limited
    if as_json:
        say_json([one.to_json() for one in found.verdicts])
    else:
        from klas_zoo.cli.package_tables import verdicts_table
        from klas_zoo.progress.tables import show

        show(verdicts_table(found.verdicts))
    say(found.summary(), err=True)
    if found.extra_files:
        say(f"Not part of the package, and not looked at: {', '.join(found.extra_files)}.", err=True)
    found.check(package)


def _report(package: Path, threads: int | None, allow_edited_config: bool) -> PackageReport:
    from klas_zoo.exporters.checking import report

    return report(package, threads=threads, allow_edited_config=allow_edited_config)
