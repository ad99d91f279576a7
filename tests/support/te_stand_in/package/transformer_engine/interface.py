"""What the calls of this version take; anything else is a TypeError."""

import functools
import inspect
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

VERSION = ".".join(version("transformer_engine").split(".")[:2])
_TABLE = json.loads((Path(__file__).parents[2] / "signatures.json").read_text())
CALLED: set[str] = set()
"""Names of the table that were called."""


def exists(name: str) -> bool:
    """Whether this version has a function."""
    return _form(name) is not None


def names_of(name: str) -> list[str]:
    """The parameters of a function, or the fields of a class."""
    return [one.rstrip("=") for one in _form(name)]


def checked(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Refuse arguments that this version's function of this name does not take."""
    signature = _signature(name)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        is_method = next(iter(inspect.signature(function).parameters), "") in ("self", "cls")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args[is_method:], **kwargs)
            CALLED.add(name)
            return function(*args, **kwargs)

        call.__signature__ = signature
        return call

    return decorate


def _form(name: str) -> list[str] | None:
    return next((form["parameters"] for form in _TABLE[name] if VERSION in form["versions"]), None)


def _signature(name: str) -> inspect.Signature:
    kinds, found = inspect.Parameter, []
    kind = kinds.POSITIONAL_OR_KEYWORD
    for one in _form(name):
        if one.startswith("**"):
            found.append(kinds(one[2:], kinds.VAR_KEYWORD))
        elif one.startswith("*"):
            kind = kinds.KEYWORD_ONLY
            if one != "*":
                found.append(kinds(one[1:], kinds.VAR_POSITIONAL))
        else:
            default = None if one.endswith("=") else kinds.empty
            found.append(kinds(one.rstrip("="), kind, default=default))
    return inspect.Signature(found)
