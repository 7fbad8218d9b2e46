"""Images decoded once, and torch's logits on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import packages
import pytest
import torch
from torch import Tensor

from klas_zoo.errors import DataError, VerificationError
from klas_zoo.exporters.reference_logits import (
    DecodedImages,
    ReferenceLogits,
    full_precision,
    reference_logits,
)

ALL = np.random.default_rng(0).normal(size=(12, 2, 3, 3)).astype(np.float32)
BATCHES = [ALL[:5], ALL[5:10], ALL[10:]]


def held(folder: Path, most_bytes: int) -> DecodedImages:
    images = DecodedImages(folder, most_bytes)
    for batch in BATCHES:
        images.append(batch, np.arange(len(batch)))
    return images


@pytest.mark.parametrize("most_bytes", [0, BATCHES[0].nbytes, 2**20], ids=["in a file", "in both", "in memory"])
def test_images_are_read_back_from_any_place(tmp_path: Path, most_bytes: int) -> None:
    images = held(tmp_path, most_bytes)
    assert len(images) == 12 and images.shape == (2, 3, 3)
    for start in range(12):
        for stop in range(start + 1, 14):
            found = images.read(start, stop)
            assert np.array_equal(found, ALL[start:stop])
            assert found.flags.c_contiguous and found.dtype == np.float32
    assert images.labels is not None and images.labels.tolist() == [*range(5), *range(5), 0, 1]
    assert not list(tmp_path.iterdir())  # the file has no name


def test_images_beyond_the_memory_that_is_allowed_lie_in_a_file(tmp_path: Path) -> None:
    in_memory = [isinstance(part, np.ndarray) for part in held(tmp_path, BATCHES[0].nbytes + 1)._parts]
    assert in_memory == [True, False, False]


def test_several_threads_read_at_once(tmp_path: Path) -> None:
    images, wrong = held(tmp_path, 0), []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(300):
            start = int(generator.integers(11))
            if not np.array_equal(images.read(start, start + 4), ALL[start : start + 4]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_labels_count_where_all_are_known() -> None:
    images = DecodedImages()
    images.append(BATCHES[0], np.zeros(5))
    images.append(BATCHES[1], None)
    assert images.labels is None
    unlabelled = DecodedImages()
    unlabelled.append(BATCHES[0], None)
    assert unlabelled.labels is None


def test_logits_are_those_of_each_route_alone_and_the_supernet_keeps_its_mode_and_place() -> None:
    supernet = packages.supernet().train()
    found = reference_logits(supernet, packages.ROUTES, packages.batches)
    assert supernet.training and all(part.training for part in supernet.modules())
    assert not any(parameter.is_inference() for parameter in supernet.parameters())
    supernet.eval()
    images = torch.cat([batch for batch, _ in packages.batches()])
    labels = torch.cat([batch for _, batch in packages.batches()])
    assert np.array_equal(found.images.read(0, len(images)), images.numpy())
    assert np.array_equal(found.images.labels, labels.numpy())
    for route in packages.ROUTES:
        with torch.no_grad():
            expected = supernet(images, route).numpy()
        np.testing.assert_allclose(found.logits[str(route)], expected, rtol=1e-5, atol=1e-5)


def test_images_are_decoded_once_and_a_batch_at_a_time() -> None:
    decoded: list[int] = []
    computed: list[int] = []

    def stream() -> Iterator[tuple[Tensor, None]]:
        for number in range(4):
            assert len(computed) == number  # the batch before is done before the next is decoded
            decoded.append(number)
            yield torch.zeros(2, *packages.SHAPE), None

    reference_logits(
        packages.supernet(), packages.ROUTES, stream, listener=lambda stage, route: computed.append(len(computed))
    )
    assert decoded == [0, 1, 2, 3]


def test_without_images_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(VerificationError, match=r"There are no images to verify with: pass --data DIR\."):
        reference_logits(packages.supernet(), packages.ROUTES, lambda: iter(()))


def test_an_image_that_cannot_be_read_leaves_the_supernet_as_it_was() -> None:
    supernet = packages.supernet().train()

    def stream() -> Iterator[tuple[Tensor, None]]:
        yield torch.zeros(2, *packages.SHAPE), None
        raise DataError("Image 3 cannot be read.")

    with pytest.raises(DataError, match="Image 3"):
        reference_logits(supernet, packages.ROUTES, stream)
    assert supernet.training


def test_tf32_is_off_while_references_are_computed_and_as_before_afterwards() -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [one.allow_tf32 for one in flags]
    try:
        flags[0].allow_tf32 = True
        flags[1].allow_tf32 = True
        with full_precision():
            assert not any(one.allow_tf32 for one in flags)
        assert all(one.allow_tf32 for one in flags)
    finally:
        for one, value in zip(flags, before, strict=True):
            one.allow_tf32 = value


@pytest.mark.gpu
def test_logits_of_a_gpu_are_those_of_the_processor_in_fp32() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    supernet = packages.supernet()
    there = reference_logits(supernet, packages.ROUTES, packages.batches, device="cuda")
    assert next(supernet.parameters()).device.type == "cpu"
    here = reference_logits(supernet, packages.ROUTES, packages.batches)
    for name, expected in here.logits.items():
        assert np.abs(there.logits[name] - expected).max() < 5e-5 * expected.std()


def test_references_that_are_there_already_are_taken_as_they_are() -> None:
    logits = {"route": np.zeros((12, 4), np.float32)}
    reference = ReferenceLogits.of_arrays(ALL, logits, np.arange(12))
    assert np.array_equal(reference.images.read(3, 9), ALL[3:9])
    assert reference.logits is logits
