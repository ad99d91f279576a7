"""The likeliest continuation, by the generation engine."""

from collections.abc import Sequence

from phi4.engine.engine import Engine
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.scheduler import TokenDrawn
from phi4.sampling.protocol import Request

_BLOCK_TOKENS = 16


def greedy(engine: Engine, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """New tokens at temperature 0, on every rank; every data and context rank is a replica."""
    size = CacheSize(-(-(len(prompt) + num_tokens) // _BLOCK_TOKENS), _BLOCK_TOKENS)
    request = Request(prompt=tuple(prompt), max_tokens=num_tokens, temperature=0.0)
    with Generator(engine, size, "weights") as generator:
        if generator.leads:
            generator.submit(request)
        # A step draws a token, the first one included.
        happened = [event for _ in range(num_tokens) for event in generator.step()]
    return [event.drawn.token for event in happened if isinstance(event, TokenDrawn)]
