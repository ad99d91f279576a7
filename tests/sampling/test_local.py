"""The sampler over the real engine: the law of events, stop strings, characters and ends.

The model is a Markov chain whose tokens are pieces of text, so that what it says is known.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.engine.generation.draws import Drawn
from phi4.engine.generation.events import TokenDrawn
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.scheduler import StepLimits
from phi4.errors import ConfigError, SamplerError
from phi4.sampling.batch import answers
from phi4.sampling.local import LocalSampler
from phi4.sampling.protocol import (
    Completion,
    Event,
    FinishReason,
    NewToken,
    Request,
    Sampler,
    ScoredPrompt,
)
from phi4.sampling.scripted import ScriptedSampler
from phi4.sampling.text import TextStream, completion_text, end_ids, text_pieces
from tests.sampling.conformance import check_events, completions, run
from tests.support.engines import engine_on
from tests.support.markov import make_markov, markov_recipe, table
from tests.support.ranks import RankPool, pool_fixture

EMOJI = "🙂".encode()
CHAIN = (b" cat sat", EMOJI[:2], EMOJI[2:3], EMOJI[3:], b"ST", b"OP", b"the")
NUMBERS = tuple(b"%d" % number for number in range(25))
TOKENIZER = Tokenizer({token: token_id for token_id, token in enumerate((*CHAIN, *NUMBERS))})
VOCAB_SIZE = TOKENIZER.vocab_size
START, END = 30, 31
LAYOUTS = {
    "one process": (),
    "tp2xpp2": ("parallel.tensor=2", "parallel.pipeline=2"),
}
SPLIT = [pytest.param("tp2xpp2", marks=pytest.mark.slow)]
Outcome = tuple[Request, list[Event]]


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def split_pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture(params=["one process", *SPLIT])
def on_leader(request, pool) -> Callable:
    """Calls a function of this file in the leading rank, over a model of a table."""
    ranks = pool if request.param == "one process" else request.getfixturevalue("split_pool")
    layout = LAYOUTS[request.param]
    return lambda *call: ranks.run(in_ranks, layout, *call)[0]


def test_every_request_keeps_the_law_and_gives_what_the_script_gives(on_leader) -> None:
    outcomes = on_leader(wide_table(), run_all, requests())
    scripted = ScriptedSampler(probabilities, TOKENIZER)
    for request, happened in outcomes:
        check_events(request, happened, TOKENIZER)
        if request.temperature == 0:
            check_same(happened, run(scripted, request)[0])


def check_same(found: list[Event], expected: list[Event]) -> None:
    """Tokens, ends and stops are equal, log-probs within rounding."""
    assert [type(event) for event in found] == [type(event) for event in expected]
    for ours, theirs in zip(completions(found), completions(expected), strict=True):
        assert (ours.finish_reason, ours.matched) == (theirs.finish_reason, theirs.matched)
        check_tokens(ours.tokens, theirs.tokens)
        for one, other in zip(ours.tokens, theirs.tokens, strict=True):
            assert close(getattr(one, "sampled_log_prob", None), other.sampled_log_prob)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, ScoredPrompt):
            check_tokens(ours.tokens, theirs.tokens)


def check_tokens(ours: tuple, theirs: tuple) -> None:
    assert [one.id for one in ours] == [one.id for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert close(one.log_prob, other.log_prob)
        assert [a.id for a in one.top] == [a.id for a in other.top]
        assert all(close(a.log_prob, b.log_prob) for a, b in zip(one.top, other.top, strict=True))


def close(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found == expected or math.isclose(found, expected, abs_tol=1e-5)


def test_stop_string_across_tokens_ends_a_sample_and_is_never_shown(on_leader) -> None:
    request = Request(prompt=(START,), max_tokens=20, n=3, stop_strings=(b"STOP",), seed=1)
    [(_, happened), *_], in_use = on_leader(
        chain_table(), run_chain, [request, replace(request, n=1)]
    )
    for completion in completions(happened):
        assert (completion.finish_reason, completion.matched) == (FinishReason.STOP, b"STOP")
        assert [token.id for token in completion.tokens] == list(range(6))
        assert completion_text(TOKENIZER, request, completion) == " cat sat🙂"
    for sample in range(request.n):
        assert shown(happened, sample, request) == [" cat sat", "", "", "🙂", "", "", ""]
    assert in_use == 0


def test_character_cut_by_length_is_one_replacement_at_the_end(on_leader) -> None:
    request = Request(prompt=(START,), max_tokens=3, temperature=0.0)
    [(_, happened)], _ = on_leader(chain_table(), run_chain, [request])
    [completion] = completions(happened)
    assert completion.finish_reason is FinishReason.LENGTH
    assert shown(happened, 0, request) == [" cat sat", "", "", "\ufffd"]


def test_each_end_id_alone_ends_a_text(on_leader) -> None:
    for end in end_ids(TOKENIZER):
        request = Request(prompt=(START,), max_tokens=20, stop_ids=end_ids(TOKENIZER))
        [(_, happened)], _ = on_leader(chain_table(end), run_chain, [request])
        [completion] = completions(happened)
        assert (completion.finish_reason, completion.matched) == (FinishReason.STOP, end)
        assert completion_text(TOKENIZER, request, completion) == " cat sat🙂STOPthe"


def shown(happened: list[Event], sample: int, request: Request) -> list[str]:
    """What a reader of the events sees of one sample, piece by piece."""
    stream = TextStream(TOKENIZER, request.stop_ids, request.stop_strings)
    tokens = [e.token for e in happened if isinstance(e, NewToken) and e.sample == sample]
    pieces = [*(stream.feed(token.id) for token in tokens), stream.finish()]
    assert "\ufffd" not in "".join(pieces[:-1])
    ids = [token.id for token in tokens]
    again = text_pieces(TOKENIZER, ids, request.stop_ids, request.stop_strings)
    assert list(again) == pieces
    return pieces


def test_cancelled_request_ends_once_and_its_neighbour_goes_on(on_leader) -> None:
    before, after, neighbour = on_leader(chain_table(), run_cancelled)
    assert {type(event) for event in before} == {NewToken}
    ended = completions(after)
    assert [one.sample for one in ended] == [0, 1]
    assert {one.finish_reason for one in ended} == {FinishReason.CANCELLED}
    for one in ended:
        drawn = [event.token for event in before if event.sample == one.sample]
        assert list(one.tokens) == drawn and len(drawn) >= 1
    assert neighbour.finish_reason is FinishReason.LENGTH


def test_impossible_requests_are_refused_before_any_output(pool) -> None:
    wrong = [
        (Request(prompt=(), max_tokens=1), "the prompt has no token"),
        (Request(prompt=(VOCAB_SIZE,), max_tokens=1), f"expected 0 to {VOCAB_SIZE - 1}"),
        (Request(prompt=(1,), max_tokens=1, temperature=math.nan), "temperature=nan"),
        (Request(prompt=(1,), max_tokens=1, temperature=1e-320), "temperature=1e-320"),
        (Request(prompt=(1,), max_tokens=1, n=0), "n=0; expected at least 1"),
        (Request(prompt=(1,), max_tokens=1, top_p=0.0), "top_p=0.0; expected above 0"),
        (Request(prompt=(1,), max_tokens=64), "exceed the model's 64"),
        (Request(prompt=(1,), max_tokens=9, stop_strings=(b"",)), "a stop string is empty"),
        (Request(prompt=(1,), max_tokens=9, n=900), "need 1801 cache blocks of 8 tokens"),
    ]
    errors = pool.run(in_ranks, (), wide_table(), refusals, [request for request, _ in wrong])[0]
    for error, (_, message) in zip(errors, wrong, strict=True):
        assert message in error and "\n" not in error


def test_a_sampler_needs_the_tokenizer_of_its_generator(pool) -> None:
    small, large = pool.run(run_other_vocabularies)[0]
    assert small == (
        "the generator samples from 128 ids, but the tokenizer has 127; create the generator with "
        "num_ids=127"
    )
    assert large.startswith("the tokenizer has 129 ids, but model.vocab_size=128")


def test_nothing_is_said_of_a_request_after_it_failed() -> None:
    fine, nan = (Drawn(1, value, value, ()) for value in (-0.5, math.nan))
    generator = Mock(num_ids=VOCAB_SIZE, max_sequence_tokens=64, **{"submit.side_effect": [0, 1]})
    generator.step.side_effect = [
        [TokenDrawn(1, 0, fine), TokenDrawn(0, 0, fine), TokenDrawn(0, 1, nan)],
        [TokenDrawn(0, 0, fine)],
    ]
    sampler = LocalSampler(generator, TOKENIZER)
    for _ in range(2):
        sampler.submit(Request(prompt=(START,), max_tokens=9, n=2))
    with pytest.raises(SamplerError):
        sampler.step()
    assert [event.request_id for event in sampler.step()] == [1]


def requests() -> list[Request]:
    """Of every kind; those at temperature 0 have one right answer."""
    drawn = [
        Request(
            prompt=(START, number % 5),
            max_tokens=4 + number % 5,
            n=1 + number % 3,
            temperature=(0.0, 0.7, 1.3)[number % 3],
            top_p=(1.0, 0.9)[number % 2],
            top_k=(0, 3, 2)[number % 3],
            seed=number,
            stop_ids=frozenset(range(0, 32, 7)) if number % 4 == 0 else frozenset(),
            stop_strings=(b"STOP", b"1", b"the") if number % 4 < 2 else (),
            forced=(4, 5) if number % 5 == 4 else (),
            forbidden_first=frozenset((1, 2)),
            log_probs=number % 2 == 0,
            prompt_log_probs=number % 3 == 1,
        )
        for number in range(16)
    ]
    greedy = Request(prompt=(3, 9, 30, 5), max_tokens=6, temperature=0.0, log_probs=True)
    return [
        *drawn,
        replace(greedy, num_top_log_probs=3, prompt_log_probs=True),
        replace(greedy, prompt_log_probs=True, max_tokens=0, n=2),
        replace(greedy, forced=(7, 8), stop_strings=(b"12",)),
        replace(greedy, logit_bias={4: 30.0}, log_probs=False, n=2),
    ]


def probabilities(ids: tuple[int, ...]) -> Mapping[int, float]:
    return dict(enumerate(wide_table().exp()[ids[-1]].tolist()))


def wide_table() -> torch.Tensor:
    """Log-probs of a chain over the pieces; the special tokens are never drawn."""
    log_probs_VV = torch.full((VOCAB_SIZE, VOCAB_SIZE), -1e9, dtype=torch.float64)
    log_probs_VV[:, :32] = table()[0]
    log_probs_VV[:32, :32] = table()
    return log_probs_VV


def chain_table(end: int = END) -> torch.Tensor:
    """The pieces in their order, then only the end; anything else has e^-40."""
    log_probs_VV = torch.full((VOCAB_SIZE, VOCAB_SIZE), -40.0, dtype=torch.float64)
    following = {START: 0, **{i: i + 1 for i in range(len(CHAIN) - 1)}, len(CHAIN) - 1: end}
    for token in range(VOCAB_SIZE):
        log_probs_VV[token, following.get(token, end)] = 0.0
    return log_probs_VV.log_softmax(-1)


def test_request_that_the_model_answers_with_nan_fails_alone(on_leader) -> None:
    failed, tokens, expected, in_use = on_leader(wide_table(), run_diverged)
    assert failed == [0, 2]
    assert tokens == expected
    assert in_use == 0


# What follows runs in the ranks.


def in_ranks(
    rank: int,
    world_size: int,
    layout: tuple[str, ...],
    log_probs_VV: torch.Tensor,
    use: Callable,
    *arguments: object,
) -> object:
    """`use(generator, sampler, *arguments)` on the leader; the others follow."""
    with engine_on(rank, markov_recipe(*layout, vocab_size=VOCAB_SIZE), trains=False) as engine:
        if engine is None:
            return None
        make_markov(engine, log_probs_VV)
        with sampler_of(engine) as (generator, sampler):
            if sampler is None:
                return generator.follow()
            found = use(generator, sampler, *arguments)
            sampler.close()
            sampler.close()
            assert not sampler.step()
            return found


@contextmanager
def sampler_of(engine) -> Iterator[tuple[Generator, Sampler | None]]:
    size, limits = CacheSize(200, 8), StepLimits(tokens=40, scored_tokens=3)
    with Generator(engine, size, "weights", limits=limits, num_ids=VOCAB_SIZE) as generator:
        yield generator, LocalSampler(generator, TOKENIZER) if generator.leads else None


def run_all(generator: Generator, sampler: Sampler, asked: list[Request]) -> list[Outcome]:
    return list(zip(asked, run(sampler, *asked).values(), strict=True))


def run_chain(
    generator: Generator, sampler: Sampler, asked: list[Request]
) -> tuple[list[Outcome], int]:
    """What happened, and the blocks that are in use afterwards."""
    happened = run_all(generator, sampler, asked)
    assert len(list(answers(sampler, asked))) == len(asked)
    sampler.step()
    return happened, generator.pool.num_in_use


def run_cancelled(
    generator: Generator, sampler: Sampler
) -> tuple[list[Event], list[Event], Completion]:
    request_id = sampler.submit(Request(prompt=(START,), max_tokens=9, n=2))
    other = sampler.submit(Request(prompt=(START,), max_tokens=5))
    before: list[Event] = []
    while sum(event.request_id == request_id for event in before) < 4:
        before += sampler.step()
    sampler.cancel(request_id)
    sampler.cancel(request_id)
    sampler.cancel(77)
    after = list(sampler.step())
    sampler.cancel(request_id)
    neighbours: list[Completion] = []
    while not neighbours:
        after += sampler.step()
        neighbours = completions(event for event in after if event.request_id == other)
    # What is open when the sampler is closed leaves nothing behind.
    sampler.submit(Request(prompt=(START,), max_tokens=9))
    mine = ([event for event in part if event.request_id == request_id] for part in (before, after))
    return *mine, neighbours[0]


def refusals(generator: Generator, sampler: Sampler, asked: list[Request]) -> list[str]:
    errors = []
    for request in asked:
        with pytest.raises(ConfigError) as caught:
            sampler.submit(request)
        errors.append(str(caught.value))
    assert not sampler.step()
    return errors


def run_other_vocabularies(rank: int, world_size: int) -> list[str]:
    errors = []
    small = Tokenizer({b"%d" % i: i for i in range(31)})
    recipe = markov_recipe(vocab_size=VOCAB_SIZE)
    with engine_on(rank, recipe, trains=False) as engine:
        with pytest.raises(ConfigError) as caught:
            LocalSampler(Generator(engine, CacheSize(2), 0), small)
        errors.append(str(caught.value))
        with pytest.raises(ConfigError) as caught:
            Generator(engine, CacheSize(2), 0, num_ids=VOCAB_SIZE + 1)
        errors.append(str(caught.value))
    return errors


def run_diverged(
    generator: Generator, sampler: Sampler
) -> tuple[list[int], list[int], list[int], int]:
    """The requests that fail, what another one gets beside them and alone, and blocks in use."""
    diverged = 7
    good = Request(prompt=(START,), max_tokens=6, stop_ids=frozenset({diverged}), seed=3)
    [alone] = answers(sampler, [good])
    # A rank that leads has the first ids of the vocabulary.
    chunk = generator._decoder._engine.bare_chunks[0]
    chunk.embedding.word_embeddings.weight.data[diverged] = torch.nan
    bad = Request(prompt=(START, diverged), max_tokens=6, n=2)
    scored = replace(bad, max_tokens=0, prompt=(*bad.prompt, 3), prompt_log_probs=True)
    first = sampler.submit(bad)
    ids = [sampler.submit(good), sampler.submit(scored)]
    failed, found = [], None
    while found is None or len(failed) < 2:
        try:
            happened = sampler.step()
        except SamplerError as error:
            failed.append(error.request_id - first)
            continue
        found = next((one for one in happened if isinstance(one, Completion)), found)
    assert found.request_id == ids[0]
    sampler.step()
    tokens, expected = ([t.id for t in one.tokens] for one in (found, alone.completions[0]))
    return failed, tokens, expected, generator.pool.num_in_use
