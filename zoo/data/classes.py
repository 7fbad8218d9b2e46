"""Which of a family's classes a folder of images means: it has names, a family only has numbers."""

from __future__ import annotations

from collections.abc import Sequence

from timm.data import ImageNetInfo

from klas_zoo.errors import DataError


def numbers_of(names: Sequence[str], num_classes: int, where: str) -> list[int]:
    """The family's number of each class.

    A family numbers its classes in the order of their names, as ImageNet does its synsets. So a folder with
    as many classes is numbered from 0 on; one with fewer only if their names are ImageNet's.

    Args:
        names: of the classes, in order.
        num_classes: that the family tells apart.
        where: the images in a few words, for messages.

    Raises:
        DataError: it does not show which of the family's classes these are.
    """
    if len(names) == num_classes:
        return list(range(num_classes))
    counts = f"{where} has {len(names)} classes, the family tells {num_classes} apart"
    if len(names) > num_classes:
        raise DataError(f"{counts}.")
    synsets = {synset: number for number, synset in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    if num_classes != len(synsets):
        raise DataError(f"{counts}: which of them these are, nothing says. Add the others, or take another family.")
    odd = next((name for name in names if name not in synsets), None)
    if odd is not None:
        raise DataError(
            f"{counts}: which of ImageNet's these are shows only if folders are named by synset, such as "
            f"n01440764; '{odd}' is none of the thousand."
        )
    return [synsets[name] for name in names]
