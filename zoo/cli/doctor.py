"""`klas-zoo doctor`: what is installed, and what of it cannot work together."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from klas_zoo.cli.options import json_option

if TYPE_CHECKING:
    from klas_zoo.doctor.installation import Installation


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what is installed, what cannot work together, and what mends it; exit 1 if anything is wrong."""
    from klas_zoo.doctor.checks import SHOWN, diagnose, extras
    from klas_zoo.doctor.installation import read_installation

    found = read_installation()
    problems, parts = diagnose(found), extras(found)
    providers = _providers()
    if as_json:
        shown = {name: found.packages[name] for name in SHOWN if name in found.packages}
        fields = {key: value for key, value in asdict(found).items() if key not in ("packages", "requires")}
        answer = {
            **fields,
            "packages": shown,
            "providers": providers,
            "problems": [asdict(one) for one in problems],
            "extras": [{**asdict(one), "command": one.command} for one in parts],
        }
        click.echo(json.dumps(answer, sort_keys=True))
    else:
        for name, value in _facts(found, providers):
            click.echo(f"{name:<22} {value}")
        click.echo("")
        for part in parts:
            state = f"missing, {part.command} brings {', '.join(part.missing)}" if part.missing else "installed"
            click.echo(f"[{part.name}] {part.adds}: {state}")
        click.echo("")
        for problem in problems:
            click.echo(f"Problem: {problem.what}\n    {problem.mend}")
        if not problems:
            click.echo("Nothing here is known not to work together.")
    if problems:
        click.get_current_context().exit(1)


def _facts(found: Installation, providers: list[str]) -> list[tuple[str, str]]:
    from klas_zoo.doctor.checks import SHOWN

    compiled = {"torch": found.torch_cuda, "onnxruntime-gpu": found.onnxruntime_cuda}
    rows = [("python", f"{found.python}, {found.system}")]
    for name in SHOWN:
        if name in found.packages:
            build = f" (CUDA {compiled[name]})" if compiled.get(name) else ""
            rows.append((name, f"{found.packages[name]}{build}"))
    newest = f", runs CUDA up to {'.'.join(map(str, found.driver_cuda))}" if found.driver_cuda else ""
    return [
        *rows,
        ("providers", ", ".join(providers) or "onnxruntime cannot be imported"),
        ("NVIDIA driver", f"{found.driver}{newest}" if found.driver else "none"),
        ("GPUs", ", ".join(found.gpus) or "none"),
    ]


def _providers() -> list[str]:
    """Compiled into onnxruntime; whether one starts shows only when it is used."""
    try:
        import onnxruntime
    except Exception:  # a broken installation can raise anything, and has a line of its own
        return []
    return list(onnxruntime.get_available_providers())
