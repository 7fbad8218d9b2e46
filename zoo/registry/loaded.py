"""An open engine with what it takes to use it on image files: preprocessing and class names. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from klas_zoo.preprocess import Picture, Preprocess
    from klas_zoo.registry.records import EngineRecord
    from klas_zoo.runtimes import Session


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One class of a prediction.

    Attributes:
        index: the class's number, from 0.
        label: its name; its number where the names are not known.
        probability: softmax of the logits, 0..1.
    """

    index: int
    label: str
    probability: float

    def __str__(self) -> str:
        return f"{self.label}  {100 * self.probability:.1f} %"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class Engine:
    """A session of a registered engine; everything that `klas_zoo.runtimes.Session` has, and images to predictions.

    Attributes:
        record: the engine as it is registered.
        classes: names by number; empty where they are not known.
    """

    def __init__(self, session: Session, record: EngineRecord) -> None:
        self.session, self.record = session, record
        self.classes = class_names(record.path)
        self.raw = session.raw
        self.runtime, self.runtime_version, self.provider = session.runtime, session.runtime_version, session.provider
        self.threads, self.options, self.input_shape = session.threads, session.options, session.input_shape
        self.smallest_batch, self.largest_batch = session.smallest_batch, session.largest_batch
        self._preprocess: Preprocess | None = None

    @property
    def preprocess(self) -> Preprocess:
        """Image files to arrays, as for the evaluation of this engine.

        Raises:
            UsageError: the engine was registered without these facts.
        """
        if self._preprocess is None:
            self._preprocess = prepared(self.record.preprocessing, self.record.input_shape, str(self.record.route))
        return self._preprocess

    def predict(self, picture: Picture, *, top: int = 5) -> list[Prediction]:
        """The most probable classes of one image, the best first.

        Args:
            picture: a path, the bytes of an image file, a PIL image, or an array (H, W, 3) uint8.
            top: how many; at most as many as there are classes.

        Raises:
            DataError: the image cannot be read.
            UsageError: `top` is less than 1, or it is not known how images are prepared.
            ExportError: the runtime failed.
        """
        import numpy as np

        if top < 1:
            raise UsageError(f"top is the number of classes to give, 1 or more, not {top}.")
        image = self.preprocess(picture)
        # an engine may take batches of one size only
        logits = self.run(np.repeat(image[None], max(1, self.smallest_batch), axis=0))[0].astype(np.float64)
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        best = np.argsort(-probabilities, kind="stable")[:top]
        return [
            Prediction(index=int(k), label=self._label(int(k)), probability=float(probabilities[k])) for k in best
        ]

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 → logits (B, classes) float32, both in the host's memory.

        Raises:
            ExportError: the engine does not take such images, or the runtime failed.
        """
        return self.session.run(images)

    def device_times(self, images: np.ndarray, count: int) -> list[float]:
        """See `klas_zoo.runtimes.Session`."""
        return self.session.device_times(images, count)

    def close(self) -> None:
        """Frees the engine's memory; it cannot be used afterwards."""
        self.session.close()
        self.raw = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _label(self, number: int) -> str:
        return self.classes[number] if number < len(self.classes) else str(number)


def prepared(facts: Mapping[str, Any], input_shape: tuple[int, ...], where: str) -> Preprocess:
    """The preprocessing of an engine or a package from what is recorded of it.

    Raises:
        UsageError: the facts are missing or have no meaning.
    """
    from klas_zoo.errors import DataError
    from klas_zoo.preprocess import Preprocess

    try:
        return Preprocess.from_json({**json.loads(json.dumps(dict(facts))), "input_size": input_shape})
    except DataError as error:
        raise UsageError(f"How images are prepared for {where} is not known: {error}") from error


def class_names(engine: Path) -> tuple[str, ...]:
    """Names by number from the manifest of an engine's package; empty where it has none."""
    from klas_zoo.registry.packages import MANIFEST

    try:
        family = json.loads((engine.parent / MANIFEST).read_text(encoding="utf-8")).get("family")
    except (OSError, ValueError, AttributeError):
        return ()
    names = family.get("classes") if isinstance(family, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()
