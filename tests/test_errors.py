"""The tree of errors and what an unknown name is answered with."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

import klas_zoo
from klas_zoo import errors
from klas_zoo.errors import Interrupted, KlasZooError, MissingPackage, UnknownName, UsageError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


def test_the_tree_at_the_top_of_the_module_is_the_tree_of_classes() -> None:
    drawn: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└── ]*)([A-Z]\w+)\b", line)
        if match:
            depth = len(match.group(1)) // 4
            above[depth:] = [match.group(2)]
            drawn[match.group(2)] = above[depth - 1] if depth else None
    found = {c.__name__: None if c is KlasZooError else c.__bases__[0].__name__ for c in CLASSES}
    assert drawn == found


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_what_makes_no_sense_exits_with_2_and_what_cannot_be_done_with_1(error: type[KlasZooError]) -> None:
    assert error.exit_code == (2 if issubclass(error, UsageError) else 1)
    assert error.__doc__


@pytest.mark.parametrize(
    ("name", "known", "hint", "message"),
    [
        ("cqu", ["cpu", "gpu-0"], "", "Unknown device 'cqu': did you mean cpu?"),
        ("tpu", ["x", "a"], "", "Unknown device 'tpu': known: a, x."),
        ("tpu", [], "", "Unknown device 'tpu': none is known yet."),
        ("tpu", ["x"], "Measure it first.", "Unknown device 'tpu': known: x. Measure it first."),
        (
            "?",
            [f"d{n:02}" for n in range(14)],
            "",
            "Unknown device '?': known: d00, d01, d02, d03, d04, d05, d06, d07, d08, d09, d10, d11, ….",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_what_would_have_been_right(
    name: str, known: list[str], hint: str, message: str
) -> None:
    assert str(UnknownName("device", name, iter(known), hint)) == message


def test_an_unknown_name_tells_the_nearest_to_programs_too() -> None:
    error = UnknownName("family", "deit-mikro", ["deit-micro", "swin"])
    assert (error.kind, error.name, error.nearest) == ("family", "deit-mikro", ["deit-micro"])


def every_class() -> list[type[KlasZooError]]:
    """The root and all classes below it, wherever they are defined."""
    for module in pkgutil.walk_packages(klas_zoo.__path__, "klas_zoo."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue  # an extra that is not installed
    found, left = [], [KlasZooError]
    while left:
        found.append(left.pop())
        left += found[-1].__subclasses__()
    return found


ARGUMENTS: dict[type, tuple[Any, ...]] = {
    UnknownName: ("family", "x", ["a", "b"], "Try it."),
    Interrupted: (signal.SIGTERM, "at step 3"),
    MissingPackage: ("klas-zoo build", "torch", "build"),
}


def test_every_error_survives_pickling_and_copying() -> None:
    classes = every_class()
    assert len(classes) >= len(CLASSES)
    for kind in classes:
        error = kind(*ARGUMENTS.get(kind, ("one sentence.",)))
        for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert type(again) is kind
            assert (str(again), again.exit_code) == (str(error), error.exit_code)
            assert vars(again) == vars(error)


def fail(name: str) -> None:
    raise UnknownName("family", name, ["deit"])


def test_a_process_pool_hands_errors_on() -> None:
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool, pytest.raises(UnknownName, match="Unknown family 'x'"):
        pool.submit(fail, "x").result(timeout=120)
    with context.Pool(1) as other, pytest.raises(UnknownName, match="Unknown family 'y'"):
        other.apply_async(fail, ("y",)).get(timeout=120)
