"""Oracles by the name that a user gives."""

from collections.abc import Callable, Mapping

from phi4.errors import ConfigError
from phi4.oracles.exact import ExactOracle
from phi4.oracles.verdict import Oracle

_ORACLES: Mapping[str, Callable[[], Oracle]] = {"exact": ExactOracle}


def open_oracle(name: str) -> Oracle:
    """The oracle of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _ORACLES:
        raise ConfigError(f"--oracle={name} is unknown; expected one of {', '.join(_ORACLES)}")
    return _ORACLES[name]()
