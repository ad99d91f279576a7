"""Describe errors of a tracking server in one line: what was received, and what to do."""

import re
from typing import NamedTuple

from phi4.errors import Phi4Error

_LONGEST = 240

_REMEDIES = (
    (
        r"error code 401|UNAUTHENTICATED|not authenticated",
        "the server requires other credentials: set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    (
        r"error code 403|PERMISSION_DENIED|Permission denied",
        "this user may not write there: request write access, or use another experiment",
    ),
    (
        r"readonly database|Read-only file system",
        "the store must be writable for this user: change its permissions, or use another "
        "tracking.uri",
    ),
    (r"disk is full|No space left on device", "the store's disk is full: free some space"),
    (
        r"unable to open database file",
        "the store's directory must exist and be writable: create it, or use another tracking.uri",
    ),
    (r"database is locked", "another process is writing to the store: this is temporary"),
    (
        r"Connection refused|Failed to resolve|No route to host|Network is unreachable",
        "expected a tracking server there: start it, or use another tracking.uri",
    ),
    (
        r"Connection aborted|Connection reset",
        "the server closed the connection during a request: check its log",
    ),
    (
        r"timed out",
        "the server responds too slowly: check its load, or raise MLFLOW_HTTP_REQUEST_TIMEOUT",
    ),
    (r"error code 5\d\d|too many 5\d\d error", "the server fails: check its log"),
)
"""Pattern in an error's text, and the remedy."""


class Trouble(NamedTuple):
    """A problem that prevents points from arriving.

    Attributes:
        kind: equal for problems that are reported only once.
        text: one line.
    """

    kind: str
    text: str


def trouble_of(error: Exception) -> Trouble:
    """Describe an error that a request raised."""
    if isinstance(error, Phi4Error):
        return Trouble(str(error), str(error))
    for pattern, remedy in _REMEDIES:
        if found := re.search(pattern, str(error)):
            return Trouble(pattern, f"{found.group()}; {remedy}")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    got = without_password(f"{type(error).__name__}: {lines[0]}")
    return Trouble(type(error).__name__, got if len(got) <= _LONGEST else f"{got[:_LONGEST]}...")


def without_password(text: str) -> str:
    """Remove the user and password between `//` and `@` of an address."""
    return re.sub(r"//[^/@\s]*@", "//", text)
