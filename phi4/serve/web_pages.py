"""Restrict browser access to the server's own page, against cross-site requests and DNS rebinding.

A request that changes or computes something is rejected if the browser reports that another site's
page sent it; no answer has CORS headers, so no such page can read one. The host name in the request
must be one of the server's own, because a site can let its name resolve to this machine, and its
pages then count as the server's. Programs other than browsers send none of these headers except
Host, and are not affected.
"""

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from phi4.serve.api_errors import ApiError
from phi4.serve.responses import error_response

_Message = MutableMapping[str, Any]
_App = Callable[..., Awaitable[None]]

LOOPBACK_HOSTS = frozenset({"localhost"})
"""Host names that only this machine can reach. Addresses need no entry."""

_WITHOUT_EFFECT = frozenset({"GET", "HEAD", "OPTIONS"})


def hosts_of(bound: str) -> frozenset[str] | None:
    """Return the host names accepted in requests.

    Args:
        bound: address or name that it listens on.

    Returns:
        None for any: if it listens on all addresses, its names are unknown.
    """
    if _is_address(bound):
        return None if ipaddress.ip_address(bound).is_unspecified else LOOPBACK_HOSTS
    return LOOPBACK_HOSTS | {bound.lower()} if bound else None


class OwnPagesOnly:
    """Rejects requests of other sites' pages.

    Args:
        app: application for the other requests.
        hosts: as `hosts_of` returns them. A request by an address is always accepted: no site can
            have one as its name.
    """

    def __init__(self, app: _App, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        error = self._fault(scope) if scope["type"] == "http" else None
        answer = self._app if error is None else error_response(scope["path"], error)
        await answer(scope, receive, send)

    def _fault(self, scope: _Message) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        name = _name_of(host)
        # Browsers always send Host; some health checks do not.
        if host and self._hosts is not None and not (name in self._hosts or _is_address(name)):
            return ApiError(
                403,
                f"the request has the host name {name!r}; expected the server's address or "
                f"{', '.join(sorted(self._hosts))}; use one of these, or start the server with "
                f"--host {name}",
                code="unknown_host",
            )
        if scope["method"] in _WITHOUT_EFFECT or not _is_of_other_site(headers, host):
            return None
        return ApiError(
            403,
            f"the request comes from a page of {headers.get(b'origin', 'another site')}; only the "
            f"server's own page may use it in a browser",
            code="foreign_origin",
        )


def _is_of_other_site(headers: dict[bytes, str], host: str) -> bool:
    """Return whether a browser sent a request for a page of another site."""
    # Also correct if a proxy changed Host; browsers omit it over plain HTTP to remote hosts.
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get(b"origin")
    return origin is not None and origin.partition("://")[2] != host


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.strip("[]").rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
