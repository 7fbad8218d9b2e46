"""`klas-zoo add`."""

from __future__ import annotations

from typing import Any

import click

from klas_zoo.cli.options import LocalPath, counts, json_option, preprocessing_options, registry_option
from klas_zoo.cli.output import say, say_json


@click.command()
@click.argument("source")
@click.option("--name", help="Of the network in the registry. Default: timm's name, or that of the file.")
@click.option("--data", help="Images to evaluate it on: a folder with a folder for each class, or a data set as klas-zoo build takes it, whose test images are used.")
@click.option("--top1", type=float, help="Instead of --data: a top-1 in per cent that somebody claims.")
@click.option("--top1-source", default="", help="Who claims it: a paper, a model card.")
@click.option("--labels", type=click.IntRange(min=1), help="How many classes it has, to be checked.")
@click.option("--classes", metavar="FILE", help="Names of its classes in its order, or imagenet-1k.")
@click.option("--device", default="cpu", show_default=True, help="What its engines are timed on.")
@click.option("--precision", "precisions", default="fp32", show_default=True, help="Of its engines, for example fp32,int8.")
@click.option("--runtime", "runtimes", help="What executes them, for example onnxruntime,openvino. Default: onnxruntime.")
@click.option("--batch", "batches", callback=counts, default="1", show_default=True, metavar="N[,N...]", help="Batch sizes to time it at.")
@click.option("--threads", type=click.IntRange(min=1), help="That compute one operator. Default: one for each physical core.")
@click.option("--weights", "checkpoint", type=LocalPath(), help="A checkpoint for a timm model. Default: timm's own weights.")
@click.option("--random-weights", is_flag=True, help="Draw the weights of a timm model at random, to time it.")
@preprocessing_options
@registry_option
@json_option
def add(
    source: str, precisions: str, runtimes: str | None, classes: str | None, as_json: bool, **options: Any
) -> None:
    """Register a plain network, so that klas-zoo pick considers it beside all stitches.

    SOURCE is timm:NAME, or an ONNX file of one input (batch, C, H, W) and one output (batch, classes). An ONNX file is
    compared with itself in a second runtime: OpenVINO where it is installed, else the reference implementation of ONNX.
    """
    from klas_zoo.catalogue.adding import add as add_network

    fields = ("mean", "std", "interpolation", "crop_pct")
    data_config = {name: value for name in fields if (value := options.pop(name)) is not None}
    if classes is not None:
        from klas_zoo.data.classes import read_classes

        options["classes"] = read_classes(classes)
    added = add_network(
        source, precisions=_names(precisions), runtimes=_names(runtimes) if runtimes else None,
        data_config=data_config or None, listener=lambda sentence: say(f"{sentence} …", err=True), **options,
    )  # fmt: skip
    for note in added.notes:
        say(f"Note: {note}", err=True)
    if as_json:
        engines = [
            {"route": str(one.route), "runtime": one.runtime, "precision": one.precision, "top1": one.top1,
             "top5": one.top5, "latencies": [latency.to_json() for latency in one.latencies]}
            for one in added.engines
        ]  # fmt: skip
        notes, refused = list(added.notes), dict(added.refused)
        say_json(
            {"build_id": added.build_id, "name": added.name, "engines": engines, "refused": refused, "notes": notes}
        )
        return
    from klas_zoo.units import format_latency

    for one in added.engines:
        claimed = f" claimed by {one.accuracy_source}" if one.claimed else f" on {one.images:,} images"
        times = ", ".join(f"batch {latency.batch} {format_latency(latency.p50_ms)}" for latency in one.latencies)
        say(f"{one.route} ({one.runtime}, {one.precision}): top-1 {one.top1:.2f} %{claimed}; {times}")
    for precision, reason in added.refused.items():
        say(f"not in {precision}: {reason}")
    say(f"Registered as build {added.build_id}.")


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))
