"""A call in a process of its own that is ended when it takes too long: no library in it can prevent that.

Signals and threads do not do: they wait for compiled code, and a graph may keep that busy for years.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from klas_zoo.errors import ProcessDied, TimeLimitExceeded

P = ParamSpec("P")
T = TypeVar("T")


def within(seconds: float, what: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `call` returns or raises, computed in a new process.

    Args:
        what: is done, the beginning of a sentence such as `Verifying the package micro`, for messages.
        call: a function of a module; it, its arguments and its result are pickled.

    Raises:
        TimeLimitExceeded: it was not done within that time, and was ended.
        ProcessDied: it ended by itself, for example because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    temporary = tempfile.TemporaryDirectory(prefix="klas-zoo-")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, temporary.name, call, args, kwargs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise TimeLimitExceeded(
                f"{what} took longer than {seconds:g} s and was stopped: raise --timeout if that is to be expected."
            )
        returned, value = ours.recv()
    except EOFError:
        process.join()
        raise ProcessDied(f"{what} ended its process ({_how(process.exitcode)}), which a sound one does not.") from None
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
        temporary.cleanup()  # also of what a process that was ended left
    if returned:
        return value
    raise value


def _run(
    connection: Any, temporary: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    tempfile.tempdir = temporary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits has it too, and ends this one
    try:
        result = True, call(*args, **kwargs)
    except Exception as error:
        result = False, error
    connection.send(result)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
