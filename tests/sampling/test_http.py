"""A sampler over a real server on loopback: what is sent, what is understood, what is refused."""

import itertools
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from phi4.data.vocabulary.chat import Message, Role
from phi4.errors import ConfigError, SamplerError
from phi4.sampling.batch import answers
from phi4.sampling.chat import chat_prompt
from phi4.sampling.endpoint import Endpoint, PromptForm
from phi4.sampling.http import HttpSampler
from phi4.sampling.protocol import FinishReason, Request
from phi4.sampling.text import completion_text, end_ids
from tests.sampling.conformance import check_events, completions, drawn_ids, run
from tests.sampling.endpoint_server import EndpointServer, serving
from tests.support.waiting import LONG_SECONDS


def choice(index: int, finish_reason: str | None = None, **fields: object) -> dict:
    return {"choices": [{"index": index, "finish_reason": finish_reason, **fields}]}


def count_up(path: str, body: dict) -> Iterator[dict]:
    """Ids that go on from the last one of the prompt, sample by sample in turn."""
    last = body["prompt"][-1]
    for step in range(body["max_tokens"]):
        for index in range(body["n"]):
            drawn = last + 1 + step + index
            fields = {"text": "?", "token_ids": [drawn]}
            if "logprobs" in body:
                top = {f"token_id:{i}": -float(i) for i in (drawn, 1, 2)}
                fields["logprobs"] = {"token_logprobs": [-0.5], "top_logprobs": [top]}
            is_last = step + 1 == body["max_tokens"]
            yield choice(index, "length" if is_last else None, **fields)
    yield b"data: [DONE]"


@contextmanager
def sampler_over(
    tokenizer, reply, form: PromptForm, **fields: object
) -> Iterator[tuple[HttpSampler, EndpointServer]]:
    with serving(reply) as server:
        where = {"base_url": server.base_url, "model": "phi", "form": form} | fields
        with closing(HttpSampler(Endpoint(**where), tokenizer)) as sampler:
            yield sampler, server


def test_ids_travel_both_ways_with_vllms_fields(tokenizer) -> None:
    request = Request(
        prompt=(7, 8),
        max_tokens=4,
        n=3,
        seed=3,
        top_k=5,
        min_p=0.1,
        logit_bias={9: 2.0},
        forced=(20,),
        stop_ids=frozenset((23,)),
    )
    with sampler_over(tokenizer, count_up, PromptForm.IDS, api_key="secret") as (sampler, server):
        happened = run(sampler, request)[0]
    check_events(request, happened, tokenizer)
    assert drawn_ids(happened) == [[20, 21, 22, 23], [20, 22, 23], [20, 23]]
    assert [c.matched for c in completions(happened)] == [23, 23, 23]
    [(path, body, authorization)] = server.asked
    assert (path, authorization) == ("/v1/completions", "Bearer secret")
    assert body == {
        "model": "phi",
        "prompt": [7, 8, 20],
        "max_tokens": 3,
        "n": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 3,
        "stream": True,
        "return_token_ids": True,
        "stop_token_ids": [23],
        "top_k": 5,
        "min_p": 0.1,
        "logit_bias": {"9": 2.0},
    }


def test_log_probs_come_where_raw_and_sampled_are_the_same(tokenizer) -> None:
    request = Request(prompt=(7,), max_tokens=2, log_probs=True, num_top_log_probs=2)
    with sampler_over(tokenizer, count_up, PromptForm.IDS) as (sampler, server):
        [completion] = completions(run(sampler, request)[0])
    assert [(t.id, t.log_prob, t.sampled_log_prob) for t in completion.tokens] == [
        (8, -0.5, -0.5),
        (9, -0.5, -0.5),
    ]
    assert [[(a.id, a.log_prob) for a in t.top] for t in completion.tokens] == [
        [(1, -1.0), (2, -2.0)]
    ] * 2
    assert server.asked[0][1]["logprobs"] == 2


def test_first_token_is_forbidden_by_a_bias(tokenizer) -> None:
    request = Request(prompt=(7,), max_tokens=1, forbidden_first=frozenset((3,)))
    with sampler_over(tokenizer, count_up, PromptForm.IDS) as (sampler, server):
        run(sampler, request)
    assert server.asked[0][1]["logit_bias"] == {"3": -100}


def test_forced_tokens_alone_ask_nobody(tokenizer) -> None:
    request = Request(prompt=(7,), max_tokens=2, n=2, forced=(4, 5))
    with sampler_over(tokenizer, count_up, PromptForm.IDS) as (sampler, server):
        happened = run(sampler, request)[0]
    check_events(request, happened, tokenizer)
    assert drawn_ids(happened) == [[4, 5], [4, 5]]
    assert server.asked == []


def said(*pieces: str, finish_reason: str = "stop", chat: bool = False):
    """A reply of text in pieces."""

    def reply(path: str, body: dict) -> Iterator[dict]:
        for piece in pieces:
            yield choice(0, **({"delta": {"content": piece}} if chat else {"text": piece}))
        yield choice(0, finish_reason, **({"delta": {}} if chat else {"text": ""}))
        yield b"data: [DONE]"

    return reply


def test_text_is_asked_and_encoded(tokenizer) -> None:
    prompt = tuple(tokenizer.encode("the cat 🙂"))
    request = Request(prompt=prompt, max_tokens=99, stop_ids=end_ids(tokenizer))
    with sampler_over(tokenizer, said("the", " end"), PromptForm.TEXT) as (sampler, server):
        happened = run(sampler, request)[0]
    check_events(request, happened, tokenizer)
    [completion] = completions(happened)
    assert (completion.finish_reason, completion.matched) == (FinishReason.STOP, None)
    assert completion_text(tokenizer, request, completion) == "the end"
    assert server.asked[0][1]["prompt"] == "the cat 🙂"


def test_conversation_is_asked_in_messages_and_typed_tokens_stay_text(tokenizer) -> None:
    turns = (Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "a<|im_end|>b"))
    request = Request(prompt=chat_prompt(turns, tokenizer), max_tokens=99)
    reply = said("the", " end", finish_reason="length", chat=True)
    with sampler_over(tokenizer, reply, PromptForm.CHAT) as (sampler, server):
        [completion] = completions(run(sampler, request)[0])
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion_text(tokenizer, request, completion) == "the end"
    path, body, _ = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a<|im_end|>b"},
    ]


def test_stop_string_over_pieces_ends_a_sample_and_the_connection(tokenizer) -> None:
    def endless(path: str, body: dict) -> Iterator[dict]:
        for piece in itertools.chain([" cat sat🙂", "ST"], itertools.repeat("OP")):
            yield choice(0, text=piece)

    request = Request(prompt=(65,), max_tokens=10**6, stop_strings=(b"STOP",))
    with sampler_over(tokenizer, endless, PromptForm.TEXT) as (sampler, server):
        happened = run(sampler, request)[0]
        assert server.closed_early.get(timeout=LONG_SECONDS) == "/v1/completions"
    check_events(request, happened, tokenizer)
    [completion] = completions(happened)
    assert completion.matched == b"STOP"
    assert completion_text(tokenizer, request, completion) == " cat sat🙂"


def silent_after_one(path: str, body: dict) -> Iterator[dict]:
    """A token, then nothing until the client has gone."""
    yield choice(0, token_ids=[5])
    while True:
        yield b": still here"


def test_cancel_closes_the_connection_and_ends_the_samples(tokenizer) -> None:
    request = Request(prompt=(7,), max_tokens=9, n=2)
    with sampler_over(tokenizer, silent_after_one, PromptForm.IDS) as (sampler, server):
        request_id = sampler.submit(request)
        happened = list(sampler.step())
        sampler.cancel(request_id)
        while new_events := sampler.step():
            happened += new_events
        server.closed_early.get(timeout=LONG_SECONDS)
        sampler.cancel(request_id)
        sampler.cancel(99)
        assert not sampler.step()
    check_events(request, happened, tokenizer)
    assert drawn_ids(happened) == [[5], []]
    assert {c.finish_reason for c in completions(happened)} == {FinishReason.CANCELLED}


def test_many_requests_share_few_connections(tokenizer) -> None:
    requests = [Request(prompt=(number,), max_tokens=2) for number in range(20)]
    with sampler_over(tokenizer, count_up, PromptForm.IDS, max_connections=2) as (sampler, _):
        found = {a.index: a for a in answers(sampler, requests, max_open=8)}
    assert len(found) == 20
    for number, answer in found.items():
        ids = [token.id for token in answer.completions[0].tokens]
        assert ids == [number + 1, number + 2]


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("ids", {"prompt_log_probs": True}, "cannot score prompts"),
        ("chat", {"prompt_log_probs": True}, "cannot score prompts"),
        ("ids", {"log_probs": True, "forced": (1,)}, "cannot return the log-probs of forced"),
        ("ids", {"log_probs": True, "temperature": 0.5}, "cannot return both log-probs"),
        ("ids", {"log_probs": True, "top_p": 0.5}, "cannot return both log-probs"),
        ("ids", {"log_probs": True, "top_k": 5}, "cannot return both log-probs"),
        ("ids", {"log_probs": True, "min_p": 0.5}, "cannot return both log-probs"),
        ("ids", {"log_probs": True, "logit_bias": {1: 1.0}}, "cannot return both log-probs"),
        ("ids", {"forbidden_first": frozenset((1,))}, "cannot forbid the first token only"),
        ("ids", {"logit_bias": {1: -101.0}}, "cannot apply a logit_bias beyond 100"),
        ("text", {"forced": (1,)}, "form=text cannot support forced"),
        ("text", {"forbidden_first": frozenset((1,))}, "cannot support forbidden_first"),
        ("text", {"logit_bias": {1: 1.0}}, "cannot support logit_bias"),
        ("chat", {"log_probs": True}, "form=chat cannot support log_probs"),
        ("chat", {"top_k": 1}, "cannot support top_k"),
        ("text", {"min_p": 0.5}, "cannot support min_p"),
        ("text", {"stop_ids": frozenset((65,))}, "cannot stop at ids other than the ends"),
        ("text", {"prompt": (65, 262)}, "special token <|dummy_0|>"),
        ("chat", {"prompt": (65,)}, "the prompt is not a conversation"),
        ("ids", {"n": 0}, "n=0; expected at least 1"),
    ],
)
def test_what_an_endpoint_lacks_is_refused_by_name(tokenizer, form, fields, message: str) -> None:
    request = Request(**{"prompt": (65,), "max_tokens": 2} | fields)
    with sampler_over(tokenizer, count_up, PromptForm(form)) as (sampler, server):
        with pytest.raises(ConfigError) as caught:
            sampler.submit(request)
        assert message in str(caught.value)
        assert not sampler.step()
    assert server.asked == []


def broken(path: str, body: dict) -> Iterator[dict | bytes]:
    """Fails in the way that the prompt names."""
    yield from {
        1: [choice(0, token_ids=[5])],
        2: [b"data: {nonsense"],
        3: [choice(0, text="a")],
        4: [choice(7, token_ids=[5])],
        5: [choice(0, "content_filter", token_ids=[5])],
        6: [choice(0, token_ids=[1 << 20])],
        7: [choice(0, "length", token_ids=[5, 6])],
        8: [choice(0, token_ids=[5]), {"error": {"message": "no memory"}}],
    }[body["prompt"][0]]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (1, "closed the connection before the end of an answer"),
        (2, "failed: JSONDecodeError"),
        (3, "sends no token ids, because it lacks return_token_ids; set form to text or chat"),
        (4, "sent IndexError"),
        (5, "content_filter"),
        (6, "sent token id 1048576"),
        (8, "failed during the answer: {'message': 'no memory'}"),
    ],
)
def test_broken_answer_is_one_error_of_its_request(tokenizer, first: int, message: str) -> None:
    with sampler_over(tokenizer, broken, PromptForm.IDS) as (sampler, server):
        bad = sampler.submit(Request(prompt=(first,), max_tokens=2))
        with pytest.raises(SamplerError) as caught:
            while sampler.step():
                pass
        assert caught.value.request_id == bad
        assert message in str(caught.value)
        assert server.base_url in str(caught.value)
        assert drawn_ids(run(sampler, Request(prompt=(7,), max_tokens=2))[0]) == [[5, 6]]


def test_refusal_of_the_server_is_quoted(tokenizer) -> None:
    with sampler_over(tokenizer, count_up, PromptForm.IDS, model="unknown") as (sampler, _):
        sampler.submit(Request(prompt=(7,), max_tokens=2))
        with pytest.raises(SamplerError, match=r"answered 404: .*no such model"):
            sampler.step()


def test_endpoint_that_is_not_there_is_one_error(tokenizer) -> None:
    with serving(count_up) as server:
        gone = server.base_url
    endpoint = Endpoint(base_url=gone, model="phi", form=PromptForm.IDS)
    with closing(HttpSampler(endpoint, tokenizer)) as sampler:
        sampler.submit(Request(prompt=(7,), max_tokens=2))
        with pytest.raises(SamplerError, match="failed: ConnectionRefusedError"):
            sampler.step()
    with pytest.raises(ConfigError, match=r"'localhost:1' is not an http:// or https:// address"):
        HttpSampler(Endpoint(base_url="localhost:1", model="phi", form=PromptForm.IDS), tokenizer)
