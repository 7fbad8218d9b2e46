"""Predicted latencies of routes, for selection and frontiers. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from klas_zoo.costs.estimates import estimate, origin_of
from klas_zoo.profiles.files import to_json
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.records import EstimatedLatency
from klas_zoo.routes import Route


@dataclass(frozen=True, kw_only=True)
class PredictedCosts:
    """Milliseconds of any route of a family on a device, by one profile's model."""

    profile: Profile

    def __call__(self, route: Route) -> float:
        """The median of a batch: as it was measured, where it was, else as the model says."""
        seen = self.profile.network(route)
        return seen.latency.p50_ms if seen else self.estimate(route).p50_ms

    def estimate(self, route: Route) -> EstimatedLatency:
        return estimate(self.profile, route)

    def anchors_ms(self) -> dict[str, float]:
        """Of every whole anchor."""
        assert self.profile.model is not None
        return {
            name: self(Route.anchor(name, len(model.block_ms))) for name, model in self.profile.model.anchors.items()
        }

    def origin(self, route: Route) -> str:
        """`measured`, or what it was predicted by, with its error."""
        return "measured" if self.profile.network(route) else origin_of(self.estimate(route))

    def describe(self) -> str:
        """A sentence for who builds."""
        one, model = self.profile, self.profile.model
        assert model is not None
        error = f"±{model.error.p90_percent:.2g} %, {model.error.method}"
        if one.origin == "roofline":
            return f"Latencies on {one.device} are predicted by a roofline ({error}): nobody has measured it."
        return f"Latencies on {one.device} are those of its profile of {one.measured_at}; interpolated ones {error}."

    def key(self) -> dict[str, object]:
        """What determines the numbers; the date of a roofline does not."""
        table = to_json(self.profile)
        return {name: table[name] for name in ("family_sha256", "device", "batch", "origin", "networks", "model")}
