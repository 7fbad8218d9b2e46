"""The tuned supernet of a family: kept by a build, so that packages can be made of it later.

    <registry>/supernets/<family>-<device>.safetensors    of the last build of that family and device

The file's header says which routes there are and what was measured of them. Safetensors hold
numbers only: nothing in them can be executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file

from klas_zoo.building.engines import RouteResult
from klas_zoo.chains import Chain
from klas_zoo.errors import UsageError, WeightsError
from klas_zoo.exporters.manifest import PackagedRoute, route_from_json, route_to_json
from klas_zoo.files import replacing
from klas_zoo.registry.records import BuildRecord
from klas_zoo.registry.store import supernet_path
from klas_zoo.supernet import Supernet

SCHEMA_VERSION = 1
_HEADER = "klas_zoo"


@dataclass(frozen=True, kw_only=True)
class TunedSupernet:
    """A tuned supernet's file and what its header tells.

    Attributes:
        build: the build's record; `build_id` is its number in the registry.
        anchors: depth of each anchor by its name, cheapest first.
    """

    path: Path
    build_id: int
    build: Mapping[str, Any]
    anchors: Mapping[str, int]
    data_config: Mapping[str, Any]
    routes: tuple[PackagedRoute, ...]

    def load(self, chains: dict[str, Chain]) -> Supernet:
        """The supernet, of chains of the same family whose weights it replaces.

        Raises:
            WeightsError: they are of another family, or the file is damaged.
        """
        if {name: chain.depth for name, chain in chains.items()} != dict(self.anchors):
            raise WeightsError(f"{self.path} holds the anchors {dict(self.anchors)}, not those of this family.")
        supernet = Supernet(chains, [one.route for one in self.routes])
        try:
            # the tensors of the file take the places of the others: they are mapped, not copied
            supernet.load_state_dict(load_file(self.path), assign=True)
        except (safetensors.SafetensorError, RuntimeError, OSError) as error:
            raise WeightsError(f"{self.path} is not the supernet of this family: build it again.") from error
        return supernet.eval().requires_grad_(False)


def keep(
    root: Path,
    supernet: Supernet,
    record: BuildRecord,
    build_id: int,
    results: Iterable[RouteResult],
    images: int,
    data_config: Mapping[str, Any],
) -> Path:
    """Writes a build's supernet into the registry's folder, in place of the one before it.

    Args:
        root: the registry's folder.
        images: how many test images the accuracies were measured on.
    """
    routes = [
        PackagedRoute(
            route=one.route, file=None, macs=one.cost.macs, parameters=one.cost.parameters, top1=one.top1,
            images=images, on_frontier=one.on_frontier, verification=None, latencies=one.latencies,
        )
        for one in results
    ]  # fmt: skip
    path = supernet_path(root, record.family, record.device)
    header = {
        "schema_version": SCHEMA_VERSION,
        "build_id": build_id,
        "build": asdict(record),
        "anchors": {key.removeprefix("anchor_"): chain.depth for key, chain in supernet.chains.items()},
        "data_config": data_config,
        "routes": [route_to_json(one) for one in routes],
    }
    with replacing(path) as temporary:
        mode = temporary.stat().st_mode
        save_supernet(supernet, temporary, header)
        temporary.chmod(mode)  # safetensors keeps a file from everybody but its owner
    return path


def save_supernet(supernet: Supernet, path: Path, header: Mapping[str, Any]) -> None:
    """Writes every tensor of a supernet, and a header that JSON can hold."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in supernet.state_dict().items()}
    save_file(tensors, path, metadata={_HEADER: json.dumps(header)})


def find(root: Path, family: str, device: str | None = None) -> TunedSupernet:
    """The supernet that the last build of a family left in a registry.

    Raises:
        UsageError: there are those of several devices, and none was named.
        WeightsError: there is none, or it cannot be read.
    """
    found = sorted((root / "supernets").glob(f"{family}-*.safetensors"))
    if device is not None:
        found = [path for path in found if path == supernet_path(root, family, device)]
    # a family's name may begin with another's
    tuned = [one for one in map(_read, found) if one.build["family"] == family]
    if not tuned:
        raise WeightsError(
            f"No build has left a tuned supernet of {family} in {root}: run klas-zoo build --family {family} "
            "first, or say --random-weights."
        )
    if len(tuned) > 1:
        devices = ", ".join(str(one.build["device"]) for one in tuned)
        raise UsageError(f"{family} was built for several devices, {devices}: say --device.")
    return tuned[0]


def _read(path: Path) -> TunedSupernet:
    try:
        with safetensors.safe_open(path, "pt") as opened:
            header = json.loads((opened.metadata() or {})[_HEADER])
        if header["schema_version"] != SCHEMA_VERSION:
            raise WeightsError(f"{path} was written by another klas-zoo: build the family again.")
        return TunedSupernet(
            path=path,
            build_id=header["build_id"],
            build=header["build"],
            anchors=header["anchors"],
            data_config=header["data_config"],
            routes=tuple(map(route_from_json, header["routes"])),
        )
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise WeightsError(f"{path} is no tuned supernet ({error}): build the family again.") from error
