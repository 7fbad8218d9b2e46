"""Whether the Hugging Face hub can be reached, found out in seconds instead of minutes of retries."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

_WAIT_S = 3.0


@contextmanager
def quick_when_offline() -> Iterator[bool]:
    """Yields whether the hub can be reached. Where it cannot, its client serves files of its cache and refuses
    everything else at once, for as long as the body runs.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reachable(constants.ENDPOINT):
        yield not constants.HF_HUB_OFFLINE
        return
    # `datasets` copies the hub's setting when it is imported
    settings = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    for one in settings:
        one.HF_HUB_OFFLINE = True
    try:
        yield False
    finally:
        for one in settings:
            one.HF_HUB_OFFLINE = False


def _reachable(endpoint: str) -> bool:
    """Whether the hub, or the proxy that leads to it, accepts a connection. Looking up its name can hang, too."""
    url = urlsplit(endpoint)
    proxy = getproxies().get(url.scheme)
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    connected = threading.Event()

    def connect() -> None:
        try:
            port = url.port or (80 if url.scheme == "http" else 443)
            socket.create_connection((url.hostname or "", port), timeout=_WAIT_S).close()
        except (OSError, ValueError):
            return
        connected.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_WAIT_S)
    return connected.is_set()
