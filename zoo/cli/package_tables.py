"""Tables of packages' routes and what was found of them. Imports rich, nothing heavier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from klas_zoo.exporters.contract import Verdict


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """One row a route: differences to torch, and accuracy where labels were known."""
    table = Table(title="Engines against torch")
    table.add_column("route")
    table.add_column("status")
    for heading in ("images", "max abs", "allowed", "cosine", "same top-1", "top-1", "torch's"):
        table.add_column(heading, justify="right")
    for one in verdicts:
        found = one.verification
        cells = [""] * 7
        if found is not None:
            cells = [
                str(found.images),
                f"{found.max_abs_difference:.2g}",
                f"{found.tolerance:.2g}",
                "" if found.cosine is None else f"{found.cosine:.6f}",
                f"{100 * found.top1_agreement:.2f} %",
                "" if found.top1 is None else f"{found.top1:.2f} %",
                "" if found.reference_top1 is None else f"{found.reference_top1:.2f} %",
            ]
        table.add_row(one.artifact.route, one.status, *cells)
    return table
