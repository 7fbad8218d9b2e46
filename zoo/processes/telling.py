"""One sentence from many processes: what all of a team meet, one of them tells."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

from torch import distributed as dist

_PATIENCE = timedelta(seconds=30)


def tell_once(say: Callable[[], None]) -> None:
    """Calls `say` in the first process of those that torchrun started to come here; the others wait until it has.

    They meet in the store that torchrun keeps for its processes. It ends them all when the first has ended,
    so none may end before the sentence is out. Where the store cannot be reached, each speaks for itself.
    """
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=_PATIENCE,
        )  # fmt: skip
        life = f"klas-zoo error, restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
        if store.add(f"{life}: told by", 1) > 1:
            store.wait([f"{life}: told"])
            return
    except RuntimeError:  # of which torch's errors of stores are; also where the one that was to tell has died
        say()
        return
    say()
    try:
        store.set(f"{life}: told", "")
    except RuntimeError:
        return  # nobody is left to wait for it
