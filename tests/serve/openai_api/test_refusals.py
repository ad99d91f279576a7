"""What is refused, in OpenAI's status codes and form, and what is accepted though it is unknown."""

import pytest

from phi4.serve.app import MAX_BODY_BYTES
from tests.serve.openai_api.known_model import MAX_SEQUENCE_TOKENS, TOKENIZER, asked_in_chat
from tests.support.served import MODEL_NAME

VOCAB_SIZE = TOKENIZER.vocab_size
UNSUPPORTED = "unsupported_parameter"


def message(role: str = "user", content: object = "a", **fields: object) -> dict:
    return {"messages": [{"role": role, "content": content} | fields]}


def error_of(response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"n": 0}, "n", "greater than or equal to 1, got '0'"),
        ({"n": 5000}, "n", "less than or equal to 4096"),
        ({"n": 3000, "prompt": ["a", "b"]}, "n", "6000 choices; expected at most 4096"),
        ({"n": "2"}, "n", "valid integer, got '2'"),
        ({"n": True}, "n", "valid integer"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, None, "max_tokens=0; expected at least 1"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 1e-9}, None, "temperature=1e-09; expected 0, or 1e-06 and more"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"seed": -1}, None, "seed=-1; expected a number of 64 bits"),
        ({"seed": "5"}, "seed", "valid integer"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"stop": 5}, "stop.0", "valid string"),
        ({"stop": ["a", ""]}, None, "a stop string is empty"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"prompt": [VOCAB_SIZE]}, None, f"token id {VOCAB_SIZE}; expected 0 to {VOCAB_SIZE - 1}"),
        ({"prompt": [-1]}, None, "token id -1"),
        ({"prompt": [10**30]}, None, "token id 1000000000000"),
        ({"prompt": []}, "prompt", "a text, a list of texts, token ids, or a list of such lists"),
        ({"prompt": [[]]}, "prompt", "a text, a list of texts, token ids"),
        ({"prompt": ["a", 5]}, "prompt", "a text, a list of texts, token ids"),
        ({"prompt": [True]}, "prompt", "a text, a list of texts, token ids"),
        ({"prompt": {"text": "a"}}, "prompt", "a text, a list of texts, token ids"),
        ({"prompt": ""}, None, "the prompt has no token"),
        ({"prompt": None}, "prompt", "Field required"),
        ({"prompt": "\ud800"}, "prompt", "surrogates not allowed"),
        ({"stop": "a\ud800"}, "stop", "surrogates not allowed"),
        ({"stop_token_ids": [VOCAB_SIZE]}, None, "stop_ids contains the token id"),
        ({"first_token_forced": VOCAB_SIZE}, None, "forced contains the token id"),
        ({"first_token_forced": "a"}, "first_token_forced.0", "valid integer"),
        ({"first_tokens_forbidden": 5}, "first_tokens_forbidden", "valid list"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "keys should be token ids"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1", "valid number"),
        ({"logit_bias": {"1": 1e7}}, None, "logit_bias[1]=10000000.0; expected -1000000"),
        ({"logit_bias": [1]}, "logit_bias", "valid dictionary"),
        ({"sampled_logprobs": True}, "sampled_logprobs", "needs logprobs"),
        ({"stream_options": {}}, "stream_options", "stream_options is for streams"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"best_of": 2}, "best_of", "best_of='2' is not supported"),
        ({"suffix": "end"}, "suffix", "suffix='end' is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "is not supported"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "is not supported"),
    ],
)
def test_faulty_completion_is_refused_by_name(client, fields, param, said: str) -> None:
    error = error_of(client.post("completions", **{"prompt": "a"} | fields))
    assert said in error["message"]
    assert error["param"] == param
    assert error["code"] == (UNSUPPORTED if "not supported" in said else None)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "a"}, "messages", "valid list"),
        (message("tool"), "messages.0.role", "'user' or 'assistant', got 'tool'"),
        (message(content=None), "messages.0.content", "Field required"),
        (message(content=5), "messages.0.content", "valid string"),
        (message(content=[5]), "messages.0.content", "not 'int'"),
        (
            message(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
            "messages.0.content",
            "not 'image_url'",
        ),
        (message(tool_calls=[{"id": "1"}]), "messages.0.tool_calls", "is not supported"),
        (message(name="Ann"), "messages.0.name", "is not supported"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "the same limit; send one"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "is not supported"),
        ({"functions": [{}]}, "functions", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"echo": True}, "echo", "is not supported"),
    ],
)
def test_faulty_chat_is_refused_by_name(client, fields, param: str, said: str) -> None:
    error = error_of(client.post("chat/completions", **message() | fields))
    assert said in error["message"]
    assert error["param"] == param
    assert error["code"] == (UNSUPPORTED if "not supported" in said else None)


NULLS = {
    **dict.fromkeys(("seed", "stop", "logit_bias", "n", "temperature", "top_p", "stream"), None),
    **{"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": None, "stream_options": None},
    **{"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "flex"},
    **{"max_tokens": 2, "top_k": -1, "unknown_to_all": ""},
}


def test_what_asks_for_nothing_is_accepted(client) -> None:
    fields = NULLS | {"prompt": "a", "best_of": 1, "suffix": None, "echo": None, "stop": ""}
    assert len(client.choices("completions", **fields)) == 1
    asked = message(content=[{"type": "text", "text": "x"}], tool_calls=None, refusal=None, name="")
    fields = NULLS | asked | {"tools": [], "functions": None, "tool_choice": "none"}
    fields |= {"response_format": {"type": "text"}, "max_completion_tokens": 2}
    assert len(client.choices("chat/completions", **fields)) == 1


@pytest.mark.parametrize(("path", "num_prompt"), [("completions", 250), ("chat/completions", 8)])
@pytest.mark.parametrize("stream", [False, True])
def test_overflow_is_refused_with_both_numbers_11(client, path, num_prompt, stream: bool) -> None:
    if path == "completions":
        body = {"prompt": "a" * num_prompt, "max_tokens": 7}
    else:
        body = message() | {"max_tokens": 300}
        num_prompt = len(asked_in_chat("a"))
    total = num_prompt + body["max_tokens"]
    error = error_of(client.post(path, stream=stream, **body))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert f"maximum context length is {MAX_SEQUENCE_TOKENS} tokens" in error["message"]
    assert f"{total}: {num_prompt} of the prompt and {body['max_tokens']}" in error["message"]


def test_prompt_that_fills_the_model_is_refused(client) -> None:
    for path, body in (
        ("completions", {"prompt": "a" * MAX_SEQUENCE_TOKENS}),
        ("chat/completions", message(content="a" * MAX_SEQUENCE_TOKENS)),
    ):
        error = error_of(client.post(path, **body))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_unknown_model_is_404(client, path: str) -> None:
    body = {"prompt": "a"} if path == "completions" else message()
    error = error_of(client.post(path, model="gpt-5", **body), 404)
    assert error["code"] == "model_not_found"
    assert "`gpt-5` does not exist; this server has `phi-4-tiny`" in error["message"]
    assert error_of(client.post(path, model=None, **body))["param"] == "model"
    assert (
        "`\ud800` does not exist"
        in error_of(client.post(path, model="\ud800", **body), 404)["message"]
    )


def test_models(client, server) -> None:
    listed = client.http.get("/v1/models").json()["data"]
    assert listed == [client.http.get(f"/v1/models/{MODEL_NAME}").json()]
    assert listed[0]["max_model_len"] == MAX_SEQUENCE_TOKENS
    response = client.http.get("/v1/models/org/other")
    assert error_of(response, 404)["message"].startswith("The model `org/other` does not exist")


@pytest.mark.parametrize("body", [b"{nonsense", b"", b"\xff", b"[" * 100_000, b"[]", b"5", b'"a"'])
def test_body_that_is_no_object_is_refused(client, body: bytes) -> None:
    error_of(client.post_text("completions", body))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_numbers_that_are_none_are_refused(client, number: str) -> None:
    for field in ("temperature", "top_p", "min_p", "max_tokens", "n"):
        body = f'{{"model": "{MODEL_NAME}", "prompt": "a", "{field}": {number}}}'
        error_of(client.post_text("completions", body))


def test_long_body_is_refused(client) -> None:
    response = client.post("completions", prompt="a" * MAX_BODY_BYTES)
    error_of(response, 413)
