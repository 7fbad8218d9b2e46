"""The command line: a thin layer over the library, a module for each command.

Results go to stdout, progress to stderr; exit 1 means "cannot be done", 2 "makes no sense".
Heavy modules are imported inside the commands that need them.
"""

from __future__ import annotations

import errno
import os
from typing import Any

import click

from klas_zoo.cli.build import build
from klas_zoo.cli.devices import devices
from klas_zoo.cli.doctor import doctor
from klas_zoo.cli.export import export
from klas_zoo.cli.listing import families, list_engines
from klas_zoo.cli.pick import pick
from klas_zoo.cli.profile import profile
from klas_zoo.cli.registry import registry
from klas_zoo.cli.routes import routes
from klas_zoo.cli.sharing import pull, push
from klas_zoo.cli.show import show
from klas_zoo.cli.verify import verify
from klas_zoo.errors import Interrupted, KlasZooError

# what a full, read-only or forbidden disk answers, wherever in a build it happens
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


class _Commands(click.Group):
    """Shows errors raised on purpose as one sentence; a bug keeps its traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KlasZooError as error:
            sentence = str(error) if isinstance(error, Interrupted) else f"Error: {error}"
            code = error.exit_code
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            where = f" {error.filename}" if error.filename else ""
            sentence = f"Error: Cannot write{where}: {os.strerror(error.errno)}. Nothing was registered."
            code = 1
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from klas_zoo.processes.telling import tell_once

            tell_once(lambda: click.echo(sentence, err=True))
        else:
            click.echo(sentence, err=True)
        raise click.exceptions.Exit(code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="klas-zoo")
def main() -> None:
    """Stitched networks for every latency budget."""


for command in (
    build,
    devices,
    doctor,
    export,
    families,
    list_engines,
    pick,
    pull,
    push,
    profile,
    registry,
    routes,
    show,
    verify,
):
    main.add_command(command)
