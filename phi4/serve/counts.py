"""What a server was asked so far, and how busy it is."""

from dataclasses import dataclass

from phi4.sampling.protocol import SamplerLoad


@dataclass
class TrafficCounts:
    """What the model was asked so far.

    Attributes:
        prompt_tokens: of requests that were begun.
        new_tokens: of all samples.
        completed: requests that were answered to their end.
        cancelled: requests whose client left, and those that a shutdown ended.
        failed: requests that the model refused or failed on.
        refused: requests that were not taken: too many were open, or the server was about to end.
        reloads: how often the weights became others.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    reloads: int = 0


@dataclass(frozen=True)
class TrafficLoad:
    """How busy the server was at the end of a step.

    Attributes:
        waiting: requests that the sampler does not have yet, for a change comes first.
        under_way: requests that it has.
        sampler: what it says itself; None where it does not.
    """

    waiting: int = 0
    under_way: int = 0
    sampler: SamplerLoad | None = None
