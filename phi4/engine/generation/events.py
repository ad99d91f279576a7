"""Events of generation: what happened to the samples of a request in a step. No tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phi4.engine.generation.draws import Drawn

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The scores of a prompt's tokens from the second one on."""

    request_id: int
    tokens: Sequence[Drawn]


@dataclass(frozen=True, slots=True)
class TokenDrawn:
    """A sample grew by one token."""

    request_id: int
    sample: int
    drawn: Drawn


@dataclass(frozen=True, slots=True)
class SampleEnded:
    """A sample ended; sent exactly once for every sample of a request."""

    request_id: int
    sample: int
    reason: FinishReason


Event = PromptScored | TokenDrawn | SampleEnded
