"""What all stages of a build share, and which of it determines their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from klas_zoo.building.cache import Json
from klas_zoo.building.settings import BuildSettings, plain
from klas_zoo.costs.predictions import PredictedCosts
from klas_zoo.data.loading import Batch, Data, Split, batches
from klas_zoo.exporters.opset import FUSED, PORTABLE
from klas_zoo.families.anchors import Family
from klas_zoo.hardware import has_dot_products
from klas_zoo.processes.signals import Signals
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.profiles.catalog import find_spec
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.macs import RouteCost as RouteCost
from klas_zoo.routes import Route
from klas_zoo.runtimes import CPU_PROVIDER
from klas_zoo.selection.measuring import MeasurementImages, images_of
from klas_zoo.versions import versions_of


def default_precisions(device: Device) -> tuple[str, ...]:
    """What engines for a device are made in by default: int8 pays on CPUs, fp16 on GPUs."""
    return ("fp32", "int8") if device.provider == CPU_PROVIDER and device.here else ("fp32", "fp16")


def default_runtimes(device: Device) -> tuple[str, ...]:
    """What engines for a device are made for by default: on NVIDIA's GPUs also TensorRT."""
    spec = find_spec(device.name)
    nvidia = device.kind == "cuda" or (spec is not None and spec.compute_capability is not None)
    return ("onnxruntime", "tensorrt") if nvidia else ("onnxruntime",)


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What all stages share: anchors, images, settings and the devices to compute on and to build for."""

    family: Family
    data: Data
    settings: BuildSettings
    device: Device
    cost_of: Callable[[Route], RouteCost]
    team: Team = ALONE
    signals: Signals
    costs: PredictedCosts | None = None

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of the engines; fp32 first, where it is among them."""
        wanted = self.settings.precisions or default_precisions(self.device)
        return tuple(sorted(dict.fromkeys(wanted), key=lambda one: one != "fp32"))

    @property
    def runtimes(self) -> tuple[str, ...]:
        """That execute the engines."""
        return self.settings.runtimes or default_runtimes(self.device)

    @property
    def opset(self) -> int:
        """The newest whose operators graphs may use; runtimes of GPUs have kernels for attention as one operator."""
        return self.settings.opset or (FUSED if "tensorrt" in default_runtimes(self.device) else PORTABLE)

    @property
    def weight_bits(self) -> int:
        """Of int8: eight where the engines are for this machine's processor, and it has dot products of eight bits."""
        return 8 if self.device.provider == CPU_PROVIDER and self.device.here and has_dot_products() else 7

    def price(self, route: Route) -> float:
        """What the frontier is drawn over: predicted milliseconds where they tell routes apart, else multiply-adds."""
        return self.costs(route) if self.costs and self.costs.tell_routes_apart else self.macs(route)

    def macs(self, route: Route) -> float:
        return self.cost_of(route).macs

    def anchors(self) -> Json:
        """What determines the anchors and everything computed with them."""
        return {
            "weights": self.family.fingerprint,
            "architecture": self.family.architecture,
            "computed": self.device.torch_device,
            "versions": versions_of("torch", "timm"),
        }

    def images(self, fingerprint: str) -> Json:
        """What determines images as tensors."""
        config = {key: plain(value) for key, value in self.family.data_config.items()}
        versions = versions_of("torchvision", "pillow", "numpy")
        return {"fingerprint": fingerprint, "config": config, "versions": versions}

    def training_images(self) -> Json:
        return {**self.images(self.data.train_fingerprint), "seed": self.settings.seed}

    def streams(self) -> MeasurementImages:
        return images_of(
            self.data, probing=self.settings.probes, batch=self.settings.batch,
            init_images=self.settings.tuning.init_images, seed=self.settings.seed,
            device=self.device.torch_device, workers=self.settings.workers, team=self.team,
        )  # fmt: skip

    def batches(self, split: Split, size: int | None = None, **options: Any) -> Iterator[Batch]:
        return batches(
            split, size or self.settings.batch, device=self.device.torch_device, workers=self.settings.workers,
            team=self.team, **options,
        )  # fmt: skip
