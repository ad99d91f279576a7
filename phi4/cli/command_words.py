"""The command line of a worker, which makes `phi4` call a command again with the same values."""

from collections.abc import Mapping


def option_words(values: Mapping[str, object]) -> list[str]:
    """Spell options.

    Args:
        values: by name, dashes included. True spells a flag; None and False spell nothing.
    """
    return [
        name if value is True else f"{name}={value}"
        for name, value in values.items()
        if value is not None and value is not False
    ]
