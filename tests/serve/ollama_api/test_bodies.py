"""What a body asks of the model: Ollama's defaults, and nothing that is left out in silence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import ModelLimits, Request
from phi4.sampling.text import end_ids
from phi4.serve.api_errors import ApiError
from phi4.serve.ollama_api.bodies import (
    NEUTRAL,
    WITHOUT_EFFECT,
    GenerateBody,
    OllamaChatBody,
    OllamaOptions,
    raw_ids,
    request_of,
)
from phi4.serve.served_model import ServedModel

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})
LONGEST = 100
MODEL = ServedModel("phi-4", TOKENIZER, ModelLimits(TOKENIZER.vocab_size, LONGEST), 0, 50)
ENDLESS = ServedModel("phi-4", TOKENIZER, ModelLimits(TOKENIZER.vocab_size), 0, 50)
# Of "Hi" in a user's turn, with the header of the answer.
NUM_PROMPT = len("user") + len("Hi") + len("assistant") + 5


def request(model: ServedModel = MODEL, **fields: object) -> Request:
    """What the model is asked by a body of these fields."""
    sent = json.dumps({"model": "phi-4", "prompt": "Hi", **fields})
    body = GenerateBody.model_validate_json(sent)
    body.refuse_unsupported()
    return request_of(body, model)


def test_defaults_are_those_of_a_modelfile() -> None:
    asked = request()
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0.8, 0.9, 40, 0.0)
    assert (asked.n, asked.max_tokens, asked.log_probs) == (1, MODEL.default_max_tokens, False)
    assert asked.stop_ids == end_ids(TOKENIZER)
    assert len(asked.prompt) == NUM_PROMPT


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0, "top_p": 0.5, "min_p": 0.1}, (0.0, 0.5, 40, 0.1)),
        ({"top_k": 0}, (0.8, 0.9, 0, 0.0)),
        ({"top_k": -1}, (0.8, 0.9, 0, 0.0)),
        ({"temperature": None, "top_k": None}, (0.8, 0.9, 40, 0.0)),
    ],
)
def test_options_set_the_draw(options: dict[str, object], expected: tuple[float, ...]) -> None:
    asked = request(options=options)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == expected


@pytest.mark.parametrize(
    ("num_predict", "expected"),
    [(None, 50), (7, 7), (-1, LONGEST - NUM_PROMPT), (-2, LONGEST - NUM_PROMPT)],
)
def test_length_is_asked_for_or_what_fits(num_predict: int | None, expected: int) -> None:
    assert request(options={"num_predict": num_predict}).max_tokens == expected


def test_length_of_a_model_without_a_known_limit_is_the_default() -> None:
    assert request(ENDLESS, options={"num_predict": -1}).max_tokens == 50


@pytest.mark.parametrize("num_predict", [0, -3])
def test_length_that_is_none_is_refused(num_predict: int) -> None:
    with pytest.raises(ApiError, match=f"num_predict={num_predict}; expected at least 1"):
        request(options={"num_predict": num_predict})


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(None, ()), ("", ()), ([], ()), ("é", ("é".encode(),)), (["a", "b"], (b"a", b"b"))],
)
def test_stop_is_a_text_or_a_list(stop: object, expected: tuple[bytes, ...]) -> None:
    assert request(options={"stop": stop}).stop_strings == expected


def test_ends_can_be_added_and_ignored() -> None:
    assert request(options={"stop_token_ids": [65]}).stop_ids == end_ids(TOKENIZER) | {65}
    assert request(options={"ignore_eos": True}).stop_ids == frozenset()


def test_seeds_are_kept_and_missing_ones_are_fresh() -> None:
    assert request(options={"seed": 0}).seed == 0
    for options in ({}, {"seed": None}, {"seed": -1}):
        assert len({request(options=options).seed for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "json"}, "format='json' is not supported"),
        ({"format": {"type": "object"}}, "format="),
        ({"suffix": "end"}, "suffix='end'"),
        ({"images": ["aGk="]}, "images="),
        ({"context": [1, 2]}, r"context=\[1, 2\]"),
        ({"think": True}, "think=True"),
        ({"think": "high"}, "think='high'"),
        ({"template": "{{ .Prompt }}"}, "template="),
        ({"truncate": True}, "truncate=True"),
        ({"options": {"repeat_penalty": 1.1}}, r"options.repeat_penalty=1.1"),
        ({"options": {"nonsense": 1}}, r"options.nonsense=1"),
        ({"raw": True, "system": "Be brief."}, "system cannot be used with a raw prompt"),
        ({"options": {"temperature": -1}}, "temperature=-1.0; expected"),
        ({"options": {"seed": -2}}, "seed=-2; expected"),
        ({"options": {"num_ctx": LONGEST + 1}}, f"context has {LONGEST} tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        request(**fields)
    assert caught.value.status == 400


NOTHING = st.sampled_from([None, 0, 0.0, False, "", [], {}])
SOMETHING = st.sampled_from([True, 2, -1, 0.5, "x", [0], {"a": None}])
KNOWN = {*WITHOUT_EFFECT, *NEUTRAL, *GenerateBody.model_fields, *OllamaOptions.model_fields}
FOREIGN = st.from_regex(r"[a-z]{1,12}", fullmatch=True).filter(lambda name: name not in KNOWN)


@given(FOREIGN, NOTHING)
def test_foreign_fields_that_say_nothing_are_accepted(name: str, value: object) -> None:
    assert request(**{name: value}).prompt == request().prompt
    assert request(options={name: value}).prompt == request().prompt


@given(FOREIGN, SOMETHING)
def test_foreign_fields_that_say_something_are_refused(name: str, value: object) -> None:
    with pytest.raises(ApiError, match=f"^{name}=.* remove {name}"):
        request(**{name: value})
    with pytest.raises(ApiError, match=f"remove options.{name}"):
        request(options={name: value})


@given(st.sampled_from(sorted(WITHOUT_EFFECT)), NOTHING | SOMETHING)
def test_fields_without_effect_change_nothing(name: str, value: object) -> None:
    plain = request(options={"seed": 1})
    assert request(options={"seed": 1, name: value}) == plain
    assert request(**{name: value}, options={"seed": 1}) == plain


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_values_are_accepted_and_others_are_not(name: str) -> None:
    assert request(options={name: NEUTRAL[name]}).max_tokens == 50
    with pytest.raises(ApiError, match=f"options.{name}=0.5"):
        request(options={name: 0.5})


def test_fields_of_messages_are_looked_at() -> None:
    sent = {"role": "user", "content": "Hi", "images": [], "tool_calls": None}
    for field in ("images", "tool_calls", "tool_name"):
        messages = [sent, {**sent, field: ["x"]}]
        body = OllamaChatBody.model_validate({"model": "phi-4", "messages": messages})
        with pytest.raises(ApiError, match=rf"^messages\.1\.{field}="):
            body.refuse_unsupported()
    OllamaChatBody.model_validate({"model": "phi-4", "messages": [sent]}).refuse_unsupported()


@given(st.lists(st.sampled_from([*TOKENIZER.special_tokens, "<|x|>", "a", "é ", "<|"])))
def test_raw_prompt_has_special_tokens_where_their_names_stand(parts: list[str]) -> None:
    ids = raw_ids("".join(parts), TOKENIZER)
    names = [part for part in parts if part in TOKENIZER.special_tokens]
    special = {token_id: name for name, token_id in TOKENIZER.special_tokens.items()}
    assert [special[token_id] for token_id in ids if token_id in special] == names
    assert b"".join(map(TOKENIZER.bytes_of, ids)).decode() == "".join(parts)
