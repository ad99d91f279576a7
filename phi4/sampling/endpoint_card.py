"""Read an endpoint's description of its model before sending requests."""

import http.client
import json
from collections.abc import Mapping
from contextlib import closing
from urllib.parse import urlsplit

from phi4.errors import ConfigError
from phi4.sampling.endpoint import Endpoint

OWNER = "phi4"
"""`owned_by` of the models that `phi4 serve` lists."""


def endpoint_card(endpoint: Endpoint) -> Mapping[str, object]:
    """Return the entry of a model in its server's list; empty if the server has no list.

    Raises:
        ConfigError: the server is unreachable, or its list is not JSON.
    """
    parts = urlsplit(endpoint.base_url.rstrip("/") + "/models")
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    key = endpoint.api_key
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with closing(
            kinds[parts.scheme](parts.netloc, timeout=endpoint.timeout_seconds)
        ) as connection:
            connection.request("GET", parts.path, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                return {}
            listed = json.loads(response.read()).get("data") or ()
            return next((card for card in listed if card.get("id") == endpoint.model), {})
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{endpoint.base_url} did not return its models: {type(error).__name__} {error}; start "
            f"it, or correct the address"
        ) from None
