"""The client of the oras package, with four of its ways changed.

It waits up to two minutes for a registry that refuses, has no time limits, reads a file as a whole before it
sends it, and uses the token that it got to read for writing too, which registries refuse.
"""

from __future__ import annotations

from typing import Any

import oras.auth
import oras.provider
import oras.utils
import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry


class Client(oras.provider.Registry):  # type: ignore[misc, unused-ignore]
    """A registry that is asked once; `client` makes its session repeat what can be repeated."""

    do_request = oras.provider.Registry.do_request.__wrapped__  # without the decorator that waits

    def put_upload(self, blob: str, container: Any, layer: dict[str, Any]) -> requests.Response:
        """Sends a file as a stream, in one request (OCI distribution specification, "POST then PUT")."""
        answer = self.do_request(f"{self.prefix}://{container.upload_blob_url()}", "POST")
        place = self._get_location(answer, container)
        if not place or answer.status_code not in (200, 201, 202):
            return answer
        headers = {"Content-Type": "application/octet-stream"}
        with open(blob, "rb") as content:
            url = oras.utils.append_url_params(place, {"digest": layer["digest"]})
            return self.do_request(url, "PUT", data=content, headers=headers)


class _Tokens(oras.auth.TokenAuth):  # type: ignore[misc, unused-ignore]
    """Bearer tokens: where one is refused, it has another scope or has expired, and a new one is asked for."""

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str], refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        found: tuple[dict[str, str], bool] = super().authenticate_request(original, headers, refresh=True)
        return found


class _Adapter(HTTPAdapter):
    """Has time limits for every request."""

    def __init__(self, timeouts: tuple[float, float], tries: int) -> None:
        self._timeouts = timeouts
        again = Retry(
            total=tries - 1, backoff_factor=0.3, status_forcelist=(429, 502, 503, 504), allowed_methods=("GET", "HEAD"),
            raise_on_status=False,
        )  # fmt: skip
        super().__init__(max_retries=again)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs["timeout"] = kwargs.get("timeout") or self._timeouts
        return super().send(request, *args, **kwargs)


def client(insecure: bool, *, basic: bool, timeouts: tuple[float, float], tries: int) -> Client:
    """
    Args:
        insecure: HTTP in place of HTTPS.
        basic: the registry takes a user and a password with every request, and no tokens.
        timeouts: in seconds, to connect and between two pieces of an answer.
        tries: of a request without content.
    """
    import logging

    made = Client(insecure=insecure, auth_backend="basic" if basic else "token")
    if not basic:
        own = _Tokens()
        own.session, own.prefix, own._tls_verify = made.session, made.prefix, made.auth._tls_verify
        made.auth = own
    logging.getLogger("oras.logger").setLevel(logging.CRITICAL)  # it prints what is an error of ours as well
    for scheme in ("http://", "https://"):
        made.session.mount(scheme, _Adapter(timeouts, tries))
    return made
