"""Which MLflow server or store is meant, and a client for it."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from phi4.errors import TrackingError
from phi4.track.mlflow.troubles import without_password
from phi4.track.mlflow.wish import TrackingWish

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUEST_SECONDS = 60
"""A server that takes longer is asked again; the user's MLFLOW_HTTP_REQUEST_TIMEOUT wins."""

_SCHEMES = re.compile(r"https?|(sqlite|postgresql|mysql|mssql)(\+\w+)?|databricks(-uc)?|uc|file")


def address_of(wish: TrackingWish) -> str:
    """The server or store that a wish means, without a password."""
    return without_password(chosen_uri(wish)[0])


def connect(uri: str) -> "MlflowClient":
    """A client that sends nothing unasked, says nothing, and does not try again by itself."""
    from mlflow import MlflowClient
    from mlflow.environment_variables import (
        MLFLOW_DISABLE_TELEMETRY,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES,
        MLFLOW_HTTP_REQUEST_TIMEOUT,
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
    )
    from mlflow.telemetry import set_telemetry_client

    # These settings of mlflow are environment variables and nothing else. Its usage reports are
    # off because a training machine calls nobody unasked; the limits, because the follower tries
    # again by itself, and a user who sets them is obeyed.
    MLFLOW_DISABLE_TELEMETRY.set(True)
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    set_telemetry_client()
    for setting, value in (
        (MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0),
        (MLFLOW_HTTP_REQUEST_TIMEOUT, REQUEST_SECONDS),
    ):
        if not setting.is_set():
            setting.set(value)
    # Creating a store tells of every table.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def chosen_uri(wish: TrackingWish) -> tuple[str, str]:
    """The address, and where it comes from."""
    from mlflow.environment_variables import MLFLOW_TRACKING_URI

    return first_set(
        (wish.uri, "tracking.uri"),
        (MLFLOW_TRACKING_URI.get(), "MLFLOW_TRACKING_URI"),
        (local_uri(wish), "the default"),
    )


def local_uri(wish: TrackingWish) -> str:
    """The store beside the run directory, where nobody names another one."""
    return f"sqlite:///{Path(wish.run_dir).parent / 'mlflow.db'}"


def first_set(*choices: tuple[str | None, str]) -> tuple[str, str]:
    """The first value that is set, and where it comes from."""
    return next((value, source) for value, source in choices if value)


def require_address(uri: str, shown: str, source: str) -> None:
    """Refuse what is no address.

    Args:
        uri: with its password.
        shown: without.
        source: where it comes from.

    Raises:
        TrackingError: it is none.
    """
    parts = urlsplit(uri)
    is_known = _SCHEMES.fullmatch(parts.scheme or uri) is not None
    if not is_known or (parts.scheme in ("http", "https") and not parts.hostname):
        raise TrackingError(
            f"{source}={shown} is no address of a tracking server or store; expected "
            "http(s)://HOST:PORT, sqlite:////PATH/mlflow.db or a database that MLflow knows"
        )
