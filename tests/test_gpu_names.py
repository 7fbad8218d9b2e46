"""`--device cuda`, in every command, is the card that is here under its own name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import fake_cuda
import made_up
import pytest

from klas_zoo.cli import main
from klas_zoo.registry import Registry
from klas_zoo.registry.tags import move_tag

NAME, HARDWARE = "a100-80", "NVIDIA A100-SXM4-80GB, compute capability 8.0, 80 GiB"
# those that compute there; finetune and doctor take cpu or cuda alone
COMPUTING = {"add", "build", "doctor", "finetune", "install"}
# in this order: the last ones change the registry
COMMANDS: dict[str, list[str]] = {
    "list": ["list", "--json"],
    "show": ["show", "there"],
    "pick": ["pick", "--latency", "10ms", "--json"],
    "frontier": ["frontier", "--json"],
    "report": ["report", "--out", "OUT/page.html"],
    "predict": ["predict", "OUT/none.png", "--latency", "10ms"],
    "evaluate": ["evaluate", "there", "--data", "OUT"],
    "export": ["export", "--family", "deit-micro", "--out", "OUT/package"],
    "profile": ["profile", "--family", "deit-micro", "--predict", "--json"],
    "profile export": ["profile", "export", "OUT/profiles.json", "--all"],
    "registry tag": ["registry", "tag", "deit-micro@prod", "--delete"],
    "registry remove": ["registry", "remove", "deit-micro", "--json"],
}
CODE = """
import os
from click.testing import CliRunner
from klas_zoo.cli import main
os.environ["KLAS_ZOO_REGISTRY"] = {root!r}
found = {{}}
for name, arguments in {commands!r}.items():
    done = CliRunner().invoke(main, [*arguments, "--device", "cuda"])
    found[name] = [done.exit_code, done.stdout, done.stderr]
print(json.dumps(found))
"""


def with_device(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[str]:
    if any(one.name == "device" for one in command.params):
        yield " ".join(path)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from with_device(below, (*path, name))


@pytest.fixture(scope="module")
def said(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("names")
    registry = Registry.open(folder / "registry", create=True)
    for device, hardware in ((NAME, HARDWARE), ("t4", "Tesla T4, compute capability 7.5, 16 GiB")):
        latency = made_up.latency(1.0, device=device, hardware=hardware, provider="CUDAExecutionProvider")
        route = "there" if device == NAME else "elsewhere"
        new = made_up.new_engine(folder / route, route, latencies=(latency,), device=device)
        made_up.register(registry, made_up.build(device=device, hardware=hardware), [new])
    move_tag(registry, "deit-micro@prod")
    commands = {
        name: [one.replace("OUT", str(folder)) for one in arguments] for name, arguments in COMMANDS.items()
    }
    code = CODE.format(root=str(registry.root), commands=commands)
    found: dict[str, Any] = fake_cuda.answer(driver, code)
    return found


def test_every_command_that_takes_a_device_is_asked() -> None:
    assert set(with_device(main)) - COMPUTING == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"predict", "evaluate", "export"}))
def test_cuda_is_the_name_of_the_card(name: str, said: dict[str, Any]) -> None:
    code, out, errors = said[name]
    assert code == 0, errors
    if name != "report":  # which says where the page is
        assert NAME in out or "there" in out or HARDWARE in out
    assert "elsewhere" not in out and "t4" not in out


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("predict", "cannot load"), ("evaluate", "prepared for there of deit-micro"), ("export", "is no manifest"),
    ],
)  # fmt: skip
def test_what_made_up_engines_cannot_do_fails_behind_the_name(name: str, why: str, said: dict[str, Any]) -> None:
    code, _, errors = said[name]
    assert code in (1, 2)
    assert "nknown device" not in errors and "several devices" not in errors
    assert why in errors, errors
