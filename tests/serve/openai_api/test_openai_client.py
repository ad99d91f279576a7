"""OpenAI's own client against the server: what it reads, and which exceptions it raises."""

import math
from collections.abc import Iterator

import openai
import pytest

from tests.serve.openai_api.known_model import TOKENIZER, A, B, E, known_server
from tests.support.served import MODEL_NAME, WEIGHTS

USER = [{"role": "user", "content": "x"}]
ANSWER = " cat sat🙂STOPthe"


def openai_client(server, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai_client(server) as one:
        yield one


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).owned_by == "phi4"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat(client) -> None:
    said = client.chat.completions.create(model=MODEL_NAME, messages=USER)
    [choice] = said.choices
    assert (choice.message.content, choice.message.role) == (ANSWER, "assistant")
    assert choice.finish_reason == "stop" and said.system_fingerprint == WEIGHTS
    # The end of the turn is a token, too.
    assert said.usage.completion_tokens == 8
    assert said.usage.total_tokens == said.usage.prompt_tokens + 8


def test_chat_in_a_stream(client) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL_NAME,
            messages=USER,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=1,
        )
    )
    *pieces, usage = chunks
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == ANSWER
    assert [one.choices[0].finish_reason for one in pieces] == [None] * 7 + ["stop"]
    scored = [entry for one in pieces for entry in one.choices[0].logprobs.content]
    assert [entry.logprob for entry in scored] == [0.0] * 8
    assert bytes(scored[0].bytes).decode() == scored[0].token == " cat sat"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 8)


def test_stream_helper_of_the_client(client) -> None:
    with client.chat.completions.stream(model=MODEL_NAME, messages=USER) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion()
    assert "".join(deltas) == whole.choices[0].message.content == ANSWER


def test_completions_with_everything(client) -> None:
    said = client.completions.create(
        model=MODEL_NAME,
        prompt=[[A, B], [A, B]],
        max_tokens=4,
        n=2,
        seed=5,
        temperature=0.7,
        top_p=0.95,
        logprobs=2,
        echo=True,
        stop=["zzz"],
        logit_bias={str(E): -100},
        extra_body={"sampled_logprobs": True},
    )
    assert [choice.index for choice in said.choices] == [0, 1, 2, 3]
    assert [c.text for c in said.choices[:2]] == [c.text for c in said.choices[2:]]
    scored = said.choices[0].logprobs
    assert scored.tokens == list(said.choices[0].text)
    assert scored.token_logprobs[:2] == [None, math.log(0.5)]
    assert scored.top_logprobs[1] == {"b": math.log(0.5), "c": math.log(0.3)}
    assert scored.text_offset == list(range(6))
    assert scored.sampled_logprobs[:2] == [None, None]
    assert scored.sampled_logprobs[2] == 0
    assert said.usage.completion_tokens == 16


def test_completions_in_a_stream(client) -> None:
    chunks = client.completions.create(model=MODEL_NAME, prompt="x", stop="STOP", stream=True)
    pieces = [chunk.choices[0] for chunk in chunks]
    assert "".join(one.text for one in pieces) == " cat sat🙂"
    assert pieces[-1].finish_reason == "stop"


def test_seed_and_n(client) -> None:
    fields = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "q"}], "n": 8}
    drawn = [
        [
            choice.message.content
            for choice in client.chat.completions.create(seed=seed, max_tokens=12, **fields).choices
        ]
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found"),
        ({"n": 0}, openai.BadRequestError, None),
        ({"prompt": [TOKENIZER.vocab_size]}, openai.BadRequestError, None),
        ({"max_tokens": 999}, openai.BadRequestError, "context_length_exceeded"),
        ({"suffix": "x"}, openai.BadRequestError, "unsupported_parameter"),
        ({"prompt": "a" * (5 << 20)}, openai.APIStatusError, None),
    ],
)
def test_errors_are_its_exceptions(client, fields, error, code: str | None, stream: bool) -> None:
    asked = {"model": MODEL_NAME, "prompt": "a"} | fields
    with pytest.raises(error) as caught:
        client.completions.create(stream=stream, **asked)
    assert caught.value.code == code and caught.value.type == "invalid_request_error"


def test_failure_in_the_middle_of_a_stream_is_an_exception(client) -> None:
    stream = client.completions.create(model=MODEL_NAME, prompt="!", stream=True)
    texts = []
    with pytest.raises(openai.APIError, match="the script has no entry") as caught:
        texts += [chunk.choices[0].text for chunk in stream]
    assert caught.value.type == "server_error"
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL_NAME, prompt="!")


def test_failure_before_a_stream_is_its_status(client) -> None:
    with pytest.raises(openai.InternalServerError, match="the script has no entry"):
        client.completions.create(model=MODEL_NAME, prompt="!aa", stream=True)


def test_key_and_too_many_requests() -> None:
    with known_server(api_key="secret", max_open=2) as server:
        with openai_client(server) as client, pytest.raises(openai.AuthenticationError) as wrong:
            client.models.list()
        assert wrong.value.code == "invalid_api_key"
        with openai_client(server, "secret") as client:
            asked = {"model": MODEL_NAME, "prompt": ["a"], "max_tokens": 1}
            assert client.completions.create(**asked).choices[0].text
            with pytest.raises(openai.BadRequestError, match="3 prompts in a request"):
                client.completions.create(**asked | {"prompt": ["a"] * 3})
