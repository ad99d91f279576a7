"""What the engine does not use of Transformer Engine."""


class NotHere:
    """A class of Transformer Engine that must not be built."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"{type(self).__name__} is no part of the stand-in")


def not_here(*args: object, **kwargs: object) -> None:
    """A function of Transformer Engine that must not be called."""
    raise NotImplementedError("no part of the stand-in")
