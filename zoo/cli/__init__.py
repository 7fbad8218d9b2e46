"""The command line: a thin layer over the library, a module for each command.

Results go to stdout, progress to stderr; exit 1 means "cannot be done", 2 is a usage error.
Heavy modules are imported inside the commands that need them.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from importlib import import_module
from typing import Any

import click

from klas_zoo.addresses import without_credentials
from klas_zoo.cli.output import say
from klas_zoo.errors import Interrupted, KlasZooError
from klas_zoo.extras import missing_package
from klas_zoo.units import printable

# what a full, read-only or forbidden disk answers, wherever in a build it happens
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


class _Commands(click.Group):
    """Shows errors raised on purpose as one sentence; a bug keeps its traceback."""

    def invoke(self, context: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a result is not lost because a terminal cannot show a character of it
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(context)
        except click.ClickException as error:
            error.message = printable(without_credentials(error.message))  # type: ignore[misc, unused-ignore]  # final in newer ones
            raise
        except KlasZooError as error:
            sentence = str(error) if isinstance(error, Interrupted) else f"Error: {error}"
            code = error.exit_code
        except ModuleNotFoundError as error:
            missing = missing_package(error, f"klas-zoo {context.invoked_subcommand}")
            if missing is None:
                raise
            sentence, code = f"Error: {missing}", missing.exit_code
        except OSError as error:
            if _is_lost():
                sentence, code = "Error: The working directory was deleted: change to another one.", 1
            elif error.errno not in _DISK_ERRORS:
                raise
            else:
                sentence, code = f"Error: {_disk_error(error)} Nothing was registered.", 1
        sentence = without_credentials(sentence)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from klas_zoo.processes.team import report_once

            report_once(lambda: say(sentence, err=True))
        else:
            say(sentence, err=True)
        raise click.exceptions.Exit(code)


def _is_lost() -> bool:
    """Whether the working directory was deleted, so that relative paths mean nothing."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _disk_error(error: OSError) -> str:
    where, why = error.filename or "a file", os.strerror(error.errno or 0)
    if error.errno in (errno.EACCES, errno.EPERM):  # the system does not say whether it was read or written
        return f"Cannot access {where}: {why}. Check the permissions of it and of the folders above it."
    return f"Cannot write {where}: {why}."


class _Lazy(dict[str, click.Command]):
    """Commands by name, imported when they are first used, so that `klas-zoo pick` imports no other."""

    def __getitem__(self, name: str) -> click.Command:
        module = import_module(f"klas_zoo.cli.{_MODULES[name]}")
        command: click.Command = getattr(module, _OTHER_NAMES.get(name, name))
        return command

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  dict's own would not import


_MODULES = {
    "add": "add",
    "build": "build",
    "cascades": "cascades",
    "devices": "devices",
    "doctor": "doctor",
    "evaluate": "evaluate",
    "export": "export",
    "families": "listing",
    "finetune": "finetune",
    "frontier": "frontier",
    "install": "install",
    "list": "listing",
    "pick": "pick",
    "predict": "predict",
    "profile": "profile",
    "pull": "sharing",
    "push": "sharing",
    "registry": "registry",
    "report": "report",
    "routes": "routes",
    "show": "show",
    "sign": "sign",
    "verify": "verify",
}
"""The module of each command. The function in it is called like the command, but for `_OTHER_NAMES`."""
_OTHER_NAMES = {"list": "list_engines"}


@click.group(
    cls=_Commands,
    commands=_Lazy(dict.fromkeys(_MODULES)),  # type: ignore[arg-type]
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="klas-zoo")
def main() -> None:
    """Stitched networks for every latency budget."""
