"""Counters and load of a server."""

from dataclasses import dataclass

from phi4.sampling.protocol import SamplerLoad


@dataclass
class TrafficCounts:
    """Counters since the start.

    Attributes:
        prompt_tokens: prompt tokens of requests that were started.
        new_tokens: new tokens of all samples.
        completed: requests that were answered completely.
        cancelled: requests whose client left, and those that a shutdown ended.
        failed: requests that the model rejected or failed on.
        refused: requests that were not accepted: too many were open, or the server was shutting
            down.
        reloads: number of weight reloads.
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
    """Load of the server at the end of a step.

    Attributes:
        waiting: requests that are not in the sampler yet, because a change has priority.
        under_way: requests in the sampler.
        sampler: the sampler's own load; None if it does not report it.
    """

    waiting: int = 0
    under_way: int = 0
    sampler: SamplerLoad | None = None
