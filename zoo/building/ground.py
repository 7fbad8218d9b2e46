"""What all stages of a build stand on, and what of it determines their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from klas_zoo.building.cache import Json
from klas_zoo.building.settings import BuildSettings, plain
from klas_zoo.costs.predicted import PredictedCosts
from klas_zoo.data.loading import Batch, Data, Split, batches
from klas_zoo.families.anchors import Family
from klas_zoo.processes.signals import Signals
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.macs import Cost as RouteCost
from klas_zoo.routes import Route
from klas_zoo.selection.measuring import Images
from klas_zoo.selection.streams import images_of
from klas_zoo.versions import versions_of


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What all stages stand on: anchors, images, settings and where they are computed."""

    family: Family
    data: Data
    settings: BuildSettings
    device: Device
    cost_of: Callable[[Route], RouteCost]
    team: Team = ALONE
    signals: Signals
    costs: PredictedCosts | None = None

    def price(self, route: Route) -> float:
        """What the frontier is drawn over: predicted milliseconds where there are any, else multiply-adds."""
        return self.costs(route) if self.costs else self.macs(route)

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

    def streams(self) -> Images:
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
