"""Determine the MLflow server or store, and make a client for it."""

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
"""A request that takes longer is repeated; the user's MLFLOW_HTTP_REQUEST_TIMEOUT has
precedence."""

_SCHEMES = re.compile(r"https?|(sqlite|postgresql|mysql|mssql)(\+\w+)?|databricks(-uc)?|uc|file")


def address_of(wish: TrackingWish) -> str:
    """Return the address of a wish's server or store, without a password."""
    return without_password(chosen_uri(wish)[0])


def connect(uri: str) -> "MlflowClient":
    """Return a client without telemetry, output, or retries."""
    from mlflow import MlflowClient
    from mlflow.environment_variables import (
        MLFLOW_DISABLE_TELEMETRY,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES,
        MLFLOW_HTTP_REQUEST_TIMEOUT,
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
    )
    from mlflow.telemetry import set_telemetry_client

    # These settings of mlflow exist only as environment variables. Its usage reports are disabled
    # because a training machine must not send unrequested data; the limits, because the follower
    # retries by itself, unless the user has set them.
    MLFLOW_DISABLE_TELEMETRY.set(True)
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    set_telemetry_client()
    for setting, value in (
        (MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0),
        (MLFLOW_HTTP_REQUEST_TIMEOUT, REQUEST_SECONDS),
    ):
        if not setting.is_set():
            setting.set(value)
    # Creating a store logs a line per table.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def chosen_uri(wish: TrackingWish) -> tuple[str, str]:
    """Return the address and its origin."""
    from mlflow.environment_variables import MLFLOW_TRACKING_URI

    return first_set(
        (wish.uri, "tracking.uri"),
        (MLFLOW_TRACKING_URI.get(), "MLFLOW_TRACKING_URI"),
        (local_uri(wish), "the default"),
    )


def local_uri(wish: TrackingWish) -> str:
    """Return the default store, next to the run directory."""
    return f"sqlite:///{Path(wish.run_dir).parent / 'mlflow.db'}"


def first_set(*choices: tuple[str | None, str]) -> tuple[str, str]:
    """Return the first value that is set, and its origin."""
    return next((value, source) for value, source in choices if value)


def require_address(uri: str, shown: str, source: str) -> None:
    """Raise an error for an invalid address.

    Args:
        uri: address with its password.
        shown: address without it.
        source: origin of the address.

    Raises:
        TrackingError: it is invalid.
    """
    parts = urlsplit(uri)
    is_known = _SCHEMES.fullmatch(parts.scheme or uri) is not None
    if not is_known or (parts.scheme in ("http", "https") and not parts.hostname):
        raise TrackingError(
            f"{source}={shown} is not an address of a tracking server or store; expected "
            "http(s)://HOST:PORT, sqlite:////PATH/mlflow.db or a database that MLflow supports"
        )
