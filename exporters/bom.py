"""A package's bill of materials: networks, where their weights come from and under which licence, data, versions.

CycloneDX 1.6 as JSON, made by cyclonedx-python-lib. It has neither a serial number nor a date, so that the same package
has the same file and stays addressed by its content. The library has no model cards (`modelCard`) yet: what they would
hold stands in properties whose names begin with `klas-zoo:`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from klas_zoo.exporters.manifest import Manifest, PackagedRoute

if TYPE_CHECKING:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component

BOM = "bom.cdx.json"
SPEC = "1.6"
"""Version of CycloneDX."""


def bom_of(manifest: Manifest) -> str:
    """The bill of materials of what a manifest describes, as JSON."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.output.json import JsonV1Dot6

    bom = Bom()
    bom.serial_number = bom.metadata.timestamp = None  # type: ignore[assignment, unused-ignore]
    family = _family(manifest)
    anchors = {str(one["name"]): _anchor(one) for one in manifest.family.anchors}
    routes = {one.name: _route(one, manifest) for one in manifest.routes}
    files = [_file(name, manifest) for name in _other_files(manifest)]
    data = [_data(manifest)] if manifest.data else []
    libraries = list(_libraries(manifest.provenance.get("versions", {})))
    bom.metadata.component = family
    for one in (*anchors.values(), *routes.values(), *files, *data, *libraries):
        bom.components.add(one)
    bom.register_dependency(family, [*routes.values(), *data, *libraries])
    weights = [one for one in files if one.name == manifest.weights]
    for route in manifest.routes:
        used = [anchors[one.anchor] for one in route.route.segments if one.anchor in anchors]
        bom.register_dependency(routes[route.name], [*used, *weights])
    text: str = JsonV1Dot6(bom).output_as_string(indent=1)
    return text + "\n"


def _family(manifest: Manifest) -> Component:
    from cyclonedx.model.component import ComponentType

    facts = manifest.family
    return _component(
        ComponentType.MACHINE_LEARNING_MODEL, facts.name, "family",
        properties=_properties(
            format=manifest.format, precision=manifest.precision, weights=facts.weights,
            input_shape="x".join(map(str, facts.input_shape)), num_classes=facts.num_classes,
        ),
    )  # fmt: skip


def _anchor(anchor: Mapping[str, Any]) -> Component:
    """A network that routes are made of, with the source and licence of its weights where the manifest has them."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
    from cyclonedx.model.component import ComponentType

    given = anchor.get("weights")
    source = {name: str(value) for name, value in given.items()} if isinstance(given, Mapping) else {}
    url, license = source.get("url", ""), source.get("license")
    known = url.startswith("https://") and url.isprintable() and " " not in url
    references = [ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(url))] if known else []
    return _component(
        ComponentType.MACHINE_LEARNING_MODEL, str(anchor.get("model") or anchor["name"]), f"anchor:{anchor['name']}",
        licenses=[LicenseFactory().make_from_string(license)] if license else [], external_references=references,
        properties=_properties(anchor=anchor["name"], depth=anchor.get("depth"), weights_source=source.get("source")),
    )  # fmt: skip


def _route(route: PackagedRoute, manifest: Manifest) -> Component:
    from cyclonedx.model.component import ComponentType

    return _component(
        ComponentType.MACHINE_LEARNING_MODEL, route.file or route.name, f"route:{route.name}",
        hashes=_hashes(route.file, manifest),
        properties=_properties(
            route=route.name, macs=route.macs, parameters=route.parameters, top1=route.top1,
            test_images=route.images or None, status=route.status,
        ),
    )  # fmt: skip


def _file(name: str, manifest: Manifest) -> Component:
    from cyclonedx.model.component import ComponentType

    return _component(ComponentType.FILE, name, f"file:{name}", hashes=_hashes(name, manifest))


def _other_files(manifest: Manifest) -> list[str]:
    engines = {one.file for one in manifest.routes}
    return sorted(name for name in manifest.files if name not in engines and name != BOM)


def _data(manifest: Manifest) -> Component:
    """The images that accuracies were measured on."""
    from cyclonedx.model.component import ComponentType

    data = manifest.data
    return _component(
        ComponentType.DATA, data.get("description") or "test images", "data:test",
        properties=_properties(fingerprint=data.get("fingerprint"), use="accuracy of every route"),
    )  # fmt: skip


def _libraries(versions: Mapping[str, Any]) -> Iterable[Component]:
    """What the package was made with."""
    from cyclonedx.model.component import ComponentType
    from packageurl import PackageURL

    for name, version in sorted(versions.items()):
        if isinstance(version, str) and re.fullmatch(r"[A-Za-z0-9._-]+", name):
            url = None if name == "python" else PackageURL("pypi", None, name.replace("_", "-").lower(), version)
            yield _component(ComponentType.LIBRARY, name, f"library:{name}", version=version, purl=url)


def _component(kind: Any, name: str, reference: str, **facts: Any) -> Component:
    from cyclonedx.model.component import Component

    return Component(type=kind, name=name, bom_ref=reference, **facts)


def _hashes(file: str | None, manifest: Manifest) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    entry = manifest.files.get(file) if file is not None else None
    return [] if entry is None else [HashType(alg=HashAlgorithm.SHA_256, content=entry.sha256)]


def _properties(**values: object) -> list[Property]:
    from cyclonedx.model import Property

    return [
        Property(name=f"klas-zoo:{name}", value=str(value)) for name, value in values.items() if value is not None
    ]
