"""Tables of packages' routes and what was found of them. Imports rich, nothing heavier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from klas_zoo.progress.tables import Column, new_table

if TYPE_CHECKING:
    from klas_zoo.exporters.contract import Verdict


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """One row a route: differences to the reference logits, and both accuracies where labels were known.

    The reference is torch, or for a joined package the engines of the packages it was made of.
    """
    numbers = ("images", "max abs", "allowed", "cosine", "same top-1", "top-1", "reference")
    columns = [
        Column(heading="route", name=True), Column(heading="status"),
        *(Column(heading=one, number=True, spare=one in ("images", "cosine", "reference")) for one in numbers),
    ]  # fmt: skip
    rows = []
    for one in verdicts:
        found = one.verification
        status: str = one.status
        cells = [""] * len(numbers)
        if found is not None:
            status += ", residual stream in fp32" if found.residual else ""
            cells = [
                str(found.images),
                f"{found.max_abs_difference:.2g}",
                f"{found.tolerance:.2g}",
                "" if found.cosine is None else f"{found.cosine:.6f}",
                f"{100 * found.top1_agreement:.2f} %",
                "" if found.top1 is None else f"{found.top1:.2f} %",
                "" if found.reference_top1 is None else f"{found.reference_top1:.2f} %",
            ]
        rows.append(([one.artifact.route, status, *cells], ""))
    return new_table("Engines against reference logits", columns, rows)
