"""`klas-zoo doctor`: what is installed, and what of it cannot work together."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from klas_zoo.cli.options import json_option
from klas_zoo.cli.output import say, say_json

if TYPE_CHECKING:
    from klas_zoo.doctor.checks import Incompatibility
    from klas_zoo.doctor.installation import Installation


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Also run a block of a network there in onnxruntime and compare its answer with the CPU's.")
@json_option
def doctor(device: str | None, as_json: bool) -> None:
    """Show what is installed, what cannot work together, and what mends it; exit 1 if anything is wrong."""
    from klas_zoo.doctor.checks import SHOWN, diagnose, extras
    from klas_zoo.doctor.installation import read_installation

    found = read_installation()
    problems, parts = diagnose(found), extras(found)
    problems += _trial(device) if device else []
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
        say_json(answer)
    else:
        for name, value in _facts(found, providers):
            say(f"{name:<22} {value}")
        say("")
        for part in parts:
            state = f"missing, {part.command} brings {', '.join(part.missing)}" if part.missing else "installed"
            say(f"[{part.name}] {part.adds}: {state}")
        say("")
        for problem in problems:
            say(f"Problem: {problem.what}\n    {problem.mend}")
        if not problems:
            say("Nothing here is known not to work together.")
    if problems:
        click.get_current_context().exit(1)


def _trial(device: str) -> list[Incompatibility]:
    from klas_zoo.doctor.checks import Incompatibility
    from klas_zoo.runtimes import CPU_PROVIDER, CUDA_PROVIDER
    from klas_zoo.runtimes.trial import provider_problem

    provider = CUDA_PROVIDER if device == "cuda" else CPU_PROVIDER
    why = provider_problem(provider)
    if why is None:
        return []
    mend = "mend what is listed above; without anything there: pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]'"
    return [Incompatibility(what=f"onnxruntime's {provider} does not compute here: {why}.", mend=mend)]


def _facts(found: Installation, providers: list[str]) -> list[tuple[str, str]]:
    from klas_zoo.doctor.checks import SHOWN
    from klas_zoo.gpus import why_no_gpu

    compiled = {"torch": found.torch_cuda, found.onnxruntime_package: found.onnxruntime_cuda}
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
        ("GPUs", ", ".join(found.gpus) or f"none: {why_no_gpu()}"),
        *([("kernels for", ", ".join(found.kernels))] if found.kernels else []),
    ]


def _providers() -> list[str]:
    """Compiled into onnxruntime; whether one starts shows only when it is used."""
    try:
        import onnxruntime
    except Exception:  # a broken installation can raise anything, and has a line of its own
        return []
    return list(onnxruntime.get_available_providers())
