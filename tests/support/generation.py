"""Requests to the generation engine, and what they got."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from phi4.engine.engine import Engine
from phi4.engine.generation.draws import Drawn
from phi4.engine.generation.events import Event, PromptScored, SampleEnded, TokenDrawn
from phi4.engine.generation.generator import CacheSize, Generator


@dataclass(frozen=True)
class Asked:
    """A request."""

    prompt: Sequence[int]
    n: int = 1
    max_tokens: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    forced: Sequence[int] = ()
    forbidden_first: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    num_top_log_probs: int = 0
    prompt_log_probs: bool = False


def collect(events: Sequence[Event], num_requests: int) -> list[dict]:
    """What every request got, samples in order."""
    tokens: list[dict] = [{} for _ in range(num_requests)]
    ends: list[dict] = [{} for _ in range(num_requests)]
    prompts: list[Sequence[Drawn]] = [() for _ in range(num_requests)]
    for event in events:
        match event:
            case TokenDrawn(i, sample, drawn):
                assert sample not in ends[i]
                tokens[i].setdefault(sample, []).append(drawn)
            case SampleEnded(i, sample, reason):
                assert sample not in ends[i]
                ends[i][sample] = reason
            case PromptScored(i, scored):
                assert not tokens[i]
                prompts[i] = scored
    return [
        {
            "tokens": [[one.token for one in t[s]] for s in sorted(t)],
            "log_probs": [one.log_prob for s in sorted(t) for one in t[s]],
            "sampled": [one.sampled_log_prob for s in sorted(t) for one in t[s]],
            "tops": [one.top for s in sorted(t) for one in t[s]],
            "ends": [e[s] for s in sorted(e)],
            "prompt": [one.log_prob for one in p],
            "prompt_tops": [one.top for one in p],
        }
        for t, e, p in zip(tokens, ends, prompts, strict=True)
    ]


def steps_of(generator: Generator) -> Iterator[list[Event]]:
    """What each step reports until the generator is idle."""
    num_silent = 0
    while not generator.is_idle:
        events = generator.step()
        num_silent = 0 if events else num_silent + 1
        assert num_silent < 100, "requests are under way, and no step gets anywhere"
        yield events


def finished(generator: Generator) -> list[Event]:
    """Everything that happens until the generator is idle."""
    return [event for events in steps_of(generator) for event in events]


def generate(generator: Generator, requests: Sequence[Asked]) -> list[list[Event]]:
    """What every step reports until all requests are finished, on every rank of the replica."""
    if generator.leads:
        for request in requests:
            generator.submit(request)
    steps, ended, expected = [], 0, sum(request.n for request in requests)
    while ended < expected:
        steps.append(generator.step())
        ended += sum(isinstance(event, SampleEnded) for event in steps[-1])
    return steps


def greedy(engine: Engine, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """New tokens at temperature 0, on every rank; every data and context rank is a replica."""
    size = CacheSize(-(-(len(prompt) + num_tokens) // 16), 16)
    request = Asked(prompt, max_tokens=num_tokens, temperature=0.0)
    with Generator(engine, size, "weights") as generator:
        steps = generate(generator, [request])
    [found] = collect([event for events in steps for event in events], 1)
    return found["tokens"][0]
