"""The model that a command names: on disk or behind an endpoint, with a key that no list shows."""

from collections.abc import Mapping

import pytest

from phi4.cli.asked_model import RemoteModel, find_asked_model
from phi4.errors import ConfigError

ADDRESS = "http://127.0.0.1:8000/v1"


def remote(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> RemoteModel:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = find_asked_model(f"{ADDRESS}#phi-4", (), None)
    assert isinstance(found, RemoteModel)
    return found


def test_endpoint_is_sent_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = remote(monkeypatch, {"OPENAI_API_KEY": "secret"})
    assert found.endpoint.api_key == "secret" and found.endpoint.base_url == ADDRESS
    # Stores of answers keep the identity.
    assert "secret" not in found.identity + repr(found)
    assert remote(monkeypatch, {}).endpoint.api_key is None


@pytest.mark.parametrize(
    ("place", "overrides", "ranks", "message"),
    [
        (ADDRESS, (), None, f"{ADDRESS} has no model name; write {ADDRESS}#NAME"),
        (
            f"{ADDRESS}#m",
            ("parallel.tensor=2",),
            None,
            "parallel.tensor=2 sets the layout of a local model",
        ),
        ("runs/a", (), "ranks", "--ranks=ranks is for an endpoint"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    place: str, overrides: tuple[str, ...], ranks: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        find_asked_model(place, overrides, ranks)
    assert str(error.value).startswith(message)
