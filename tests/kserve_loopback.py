"""KServe's own server, listening on loopback: it has no option for that, and means a container's addresses."""

from __future__ import annotations

from typing import Any

import grpc
import uvicorn

from klas_zoo.serving.kserve_model import main


class _Config(uvicorn.Config):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "host": "127.0.0.1"})


def _on_loopback(add: Any) -> Any:
    return lambda server, address, *rest: add(server, address.replace("[::]", "127.0.0.1"), *rest)


if __name__ == "__main__":
    uvicorn.Config = _Config
    grpc.aio.Server.add_insecure_port = _on_loopback(grpc.aio.Server.add_insecure_port)
    main()
