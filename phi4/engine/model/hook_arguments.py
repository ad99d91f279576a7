"""Check arguments that megatron-core passes to our modules: an ignored argument must have no
effect."""

from collections.abc import Mapping
from enum import Enum

from phi4.errors import ConfigError


def refuse(hook: str, given: Mapping[str, object], neutral: Mapping[str, object]) -> None:
    """Raise an error for arguments of a call that a module does not implement.

    Args:
        hook: name of the module, for the message.
        given: the arguments that the module does not read.
        neutral: megatron-core's names for such arguments, each with the value that has no effect:
            None, a boolean, a string or a member of an enum.

    Raises:
        ConfigError: an argument has another value, or an unknown name.
    """
    for name, value in given.items():
        if name not in neutral:
            raise ConfigError(
                f"{hook} got the unknown argument {name}; expected those of megatron-core 0.16.1; "
                "install the version in the constraints"
            )
        # Not compared for equality: a tensor would compare its elements.
        if value is not neutral[name] and not (isinstance(value, str) and value == neutral[name]):
            plain = value is None or isinstance(value, str | int | float | Enum)
            found = value if plain else type(value).__name__
            raise ConfigError(
                f"{hook} got {name}={found}; expected {neutral[name]}, because it does not "
                "implement this; remove what sets it in the model's configuration"
            )
