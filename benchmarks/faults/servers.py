"""Malformed requests to real inference servers, each beside good ones: `sh scripts/servers` installs the servers.

What is sent is told in tests/malformed.py and tests/malformed_sending.py. Some requests a server refuses itself, before
the model sees them, and not always as the client's error: these are counted apart.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import malformed_sending

from faults import Figure, Outcome


def run(scale: float) -> Outcome:
    """As many requests as there are, whatever the scale."""
    figures, numbers = [], {}
    for kind in malformed_sending.SERVERS:
        with (
            tempfile.TemporaryDirectory(prefix="klas-zoo-faults-") as folder,
            malformed_sending.started(kind, Path(folder)) as server,
        ):
            reports = {
                "HTTP": malformed_sending.over_http(kind, server),
                "gRPC": malformed_sending.over_grpc(kind, server),
            }
        for protocol, report in reports.items():
            own = Counter(f"{status}: {what}" for what, status, _ in report.servers_own)
            figures.append(Figure(
                name=f"{kind}, {protocol}: {report.seen.total()} malformed requests beside good ones",
                wanted="0 that are not the client's error, 0 good ones lost",
                measured=f"{len(report.wrong)}, {len(report.lost)} of {report.right + len(report.lost):,} "
                f"({sum(own.values())} answered by the front end in its own way)",
                kept=not report.wrong and not report.lost and report.right > 20,
            ))  # fmt: skip
            numbers[f"{kind} {protocol}"] = {
                "statuses": dict(sorted(report.seen.items())), "wrong": report.wrong, "servers_own": dict(own),
                "good_answered": report.right, "good_lost": report.lost,
            }  # fmt: skip
    return Outcome(figures=tuple(figures), numbers={"seeds": {"HTTP": 3, "gRPC": 4}, **numbers})
