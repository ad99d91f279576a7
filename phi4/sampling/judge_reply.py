"""Parse a judge's reply as an opinion: faults, a comparison, and scores of both answers.

A reply must be exactly one JSON object that matches the schema, with white space or one code fence
around it. A second object, other text, a duplicate key or truncation makes the entire reply
invalid; a verdict is never extracted from parts of a reply.
"""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from phi4.errors import DataError
from phi4.sampling.judge_prompt import Showing

_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_MAX_DEPTH_TEXT = 1 << 20

Score = Annotated[int, Field(ge=1, le=5)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AnswerFault(_Part):
    """A fault of an answer."""

    cause: Literal["comprehension", "logic", "fact", "style"]
    description: str


class Ratings(_Part):
    """Scores of an answer from 1, the worst, to 5."""

    accuracy: Score
    style: Score
    detail: Score

    @property
    def overall(self) -> float:
        """The mean of the three."""
        return (self.accuracy + self.style + self.detail) / 3


class FaultLists(_Part):
    """The faults of both answers."""

    first: list[AnswerFault]
    second: list[AnswerFault]


class RatingsOfBoth(_Part):
    """The ratings of both answers."""

    first: Ratings
    second: Ratings


class Opinion(_Part):
    """A judge's opinion of two answers. Source: report, appendix A.2."""

    faults: FaultLists
    comparison: str
    scores: RatingsOfBoth


class OpinionError(DataError):
    """A reply is not a valid opinion; the message is the reason."""


def read_opinion(reply: str, showing: Showing) -> Opinion:
    """Parse a reply as an opinion.

    Args:
        reply: text of the judge's completion.
        showing: the showing that it replies to: a reply that only repeats an answer is invalid.

    Raises:
        OpinionError: it is not exactly one JSON object of this form.
    """
    text = reply.strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1].strip()
    if len(text) > _MAX_DEPTH_TEXT:
        raise OpinionError(f"{len(text)} characters; at most {_MAX_DEPTH_TEXT} are read")
    value = _one_object(text)
    bare = _without_space(text)
    if any(bare in _without_space(answer) for answer in (showing.first, showing.second)):
        raise OpinionError("repeats an object from an answer")
    try:
        return Opinion.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the object"
        raise OpinionError(f"wrong format: {place}: {first['msg']}") from None


def _one_object(text: str) -> dict[str, object]:
    if not text.startswith("{"):
        raise OpinionError("does not begin with a JSON object" if text else "empty")
    try:
        value, end = json.JSONDecoder(object_pairs_hook=_no_key_twice).raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise OpinionError(f"truncated or not JSON: {error}") from None
    if text[end:].strip():
        raise OpinionError(f"continues after its object: {text[end:].strip()[:40]!r}")
    return value


def _no_key_twice(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise OpinionError("an object has a duplicate key")
    return found


def _without_space(text: str) -> str:
    return "".join(text.split())
