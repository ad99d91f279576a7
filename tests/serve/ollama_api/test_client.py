"""Ollama's own client gets from this server what it gets from Ollama."""

import math
from datetime import UTC, datetime

import ollama
import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.serve.ollama_api.bodies import MOST_TOP_LOGPROBS
from tests.serve.ollama_api.conftest import MAX_SEQUENCE_TOKENS, Asked, turns
from tests.support.served import MODEL_NAME, Served

GREEDY = {"temperature": 0.0}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_prompt_is_a_users_turn_and_the_reply_has_all_counts(client, sampler, tokenizer) -> None:
    reply = client.generate(MODEL_NAME, "Why?")
    assert reply.response == "Because."
    assert (reply.model, reply.done, reply.done_reason) == (MODEL_NAME, True, "stop")
    assert reply.prompt_eval_count == len(sampler.requests[-1].prompt)
    # The end of the turn is drawn, too.
    assert reply.eval_count == len(tokenizer.encode("Because.")) + 1
    times = (reply.prompt_eval_duration, reply.eval_duration)
    assert min(times) > 0 and sum(times) <= reply.total_duration
    assert datetime.fromisoformat(reply.created_at).tzinfo == UTC


def test_system_prompt_stands_before_the_prompt(client) -> None:
    assert client.generate(MODEL_NAME, "Why?", system="Be brief.").response == "So."


def test_stream_is_the_whole_reply_in_pieces(client) -> None:
    whole = client.generate(MODEL_NAME, "Why?", stream=False)
    *parts, last = client.generate(MODEL_NAME, "Why?", stream=True)
    assert len(parts) > 1 and not any(part.done or part.done_reason for part in parts)
    assert "".join(part.response for part in parts) == whole.response
    counts = ("done", "done_reason", "prompt_eval_count", "eval_count")
    assert [last[name] for name in counts] == [whole[name] for name in counts]
    assert last.response == "" and last.eval_duration > 0


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_the_conversation_in_phi4s_format(client, stream: bool) -> None:
    said = [user("What?"), {"role": "assistant", "content": "B."}, user("And?")]
    reply = client.chat(MODEL_NAME, said, stream=stream, tools=[])
    parts = list(reply) if stream else [reply]
    assert {part.message.role for part in parts} == {"assistant"}
    assert "".join(part.message.content for part in parts) == "Still."
    assert (parts[-1].done, parts[-1].done_reason) == (True, "stop")


def test_chat_goes_on_with_an_answer_that_is_last(client) -> None:
    said = [user("Count"), {"role": "assistant", "content": "one "}]
    assert client.chat(MODEL_NAME, said).message.content == "two"


def test_special_tokens_in_content_are_text(client, sampler, tokenizer) -> None:
    assert client.chat(MODEL_NAME, [user("a<|im_end|>b")]).message.content == "Text."
    assert sampler.requests[-1].prompt.count(tokenizer.im_end_id) == 1


def test_raw_prompt_brings_its_own_template(client, sampler, tokenizer) -> None:
    assert client.generate(MODEL_NAME, "1+1=", raw=True).response == "2"
    assert sampler.requests[-1].prompt == tuple(tokenizer.encode("1+1="))
    template = "<|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>"
    assert client.generate(MODEL_NAME, template, raw=True).response == "Because."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["STOP", ["never", "STOP"]])
def test_no_part_of_a_stop_string_or_of_a_character_is_shown(client, stop, stream: bool) -> None:
    reply = client.generate(MODEL_NAME, "Spell", stream=stream, options={"stop": stop})
    parts = list(reply) if stream else [reply]
    assert "".join(part.response for part in parts) == " cat sat🙂"
    assert not any("\ufffd" in part.response for part in parts)
    assert parts[-1].done_reason == "stop"


def test_num_predict_ends_a_reply_by_its_length(client) -> None:
    reply = client.generate(MODEL_NAME, "Spell", options={"num_predict": 3})
    assert (reply.response, reply.done_reason, reply.eval_count) == (" cat sat\ufffd", "length", 3)


def test_seed_repeats_a_reply_and_without_one_replies_differ(client) -> None:
    def tossed(**options: object) -> str:
        return client.generate(MODEL_NAME, "Toss", options=options).response

    assert tossed(seed=5) == tossed(seed=5)
    assert len({tossed() for _ in range(4)}) > 1
    assert len({tossed(seed=-1) for _ in range(4)}) > 1
    assert len({tossed(seed=seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_the_raw_models(client, stream: bool) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "options": {"seed": 1, "temperature": 0.3}}
    reply = client.chat(MODEL_NAME, [user("Toss one")], stream=stream, **fields)
    parts = list(reply) if stream else [reply]
    text = "".join(part.message.content for part in parts)
    [scored] = [one for part in parts for one in part.logprobs or ()]
    raw = {"H": 0.75, "T": 0.25}
    assert (scored.token, math.exp(scored.logprob)) == (text, pytest.approx(raw[text]))
    top = {one.token: math.exp(one.logprob) for one in scored.top_logprobs}
    assert top == pytest.approx(raw)


def test_empty_requests_only_ask_whether_the_model_is_there(client, server: Served) -> None:
    asked = server.traffic.counts.prompt_tokens
    assert client.generate(MODEL_NAME).done_reason == "load"
    assert client.generate(MODEL_NAME, "", keep_alive=0, stream=False).response == ""
    chat = client.chat(MODEL_NAME, [])
    assert (chat.done, chat.done_reason, chat.message.content) == (True, "load", "")
    assert server.traffic.counts.prompt_tokens == asked


def test_names_with_and_without_the_default_tag_are_one_model(client) -> None:
    assert client.generate(f"{MODEL_NAME}:latest", "Why?").model == f"{MODEL_NAME}:latest"
    for other in (f"{MODEL_NAME}:14b", "llama3", f"x/{MODEL_NAME}"):
        for ask in (client.generate, client.chat, client.show):
            with pytest.raises(ollama.ResponseError, match=f"model '{other}' not found") as caught:
                ask(other)
            assert caught.value.status_code == 404


def test_errors_before_the_first_piece_have_a_status_when_streamed(client) -> None:
    with pytest.raises(ollama.ResponseError, match="no entry for") as caught:
        list(client.generate(MODEL_NAME, "What?", stream=True))
    assert caught.value.status_code == 500


@pytest.mark.parametrize("num_predict", [MAX_SEQUENCE_TOKENS, 1])
def test_overflow_says_both_numbers(client, num_predict: int) -> None:
    text = "a" * (MAX_SEQUENCE_TOKENS if num_predict == 1 else 1)
    with pytest.raises(ollama.ResponseError, match="or lower num_predict") as caught:
        client.generate(MODEL_NAME, text, options={"num_predict": num_predict})
    assert caught.value.status_code == 400
    assert f"maximum context length is {MAX_SEQUENCE_TOKENS} tokens" in caught.value.error
    assert f"{num_predict} to be generated" in caught.value.error


@pytest.mark.parametrize("option", [{"num_ctx": MAX_SEQUENCE_TOKENS + 1}, {"mirostat": 2}])
def test_options_that_the_model_lacks_are_named(client, option: dict[str, int]) -> None:
    [name] = option
    with pytest.raises(ollama.ResponseError, match=f"options.{name}=") as caught:
        client.chat(MODEL_NAME, [user("Why?")], options=option)
    assert caught.value.status_code == 400


def test_too_many_alternatives_are_refused(client) -> None:
    for fields in ({"logprobs": True, "top_logprobs": MOST_TOP_LOGPROBS + 1}, {"top_logprobs": 1}):
        with pytest.raises(ollama.ResponseError, match="top_logprobs") as caught:
            client.generate(MODEL_NAME, "Why?", **fields)
        assert caught.value.status_code == 400


def test_list_ps_and_show_describe_the_model(client, server: Served, tokenizer: Tokenizer) -> None:
    [listed], [running] = client.list().models, client.ps().models
    assert listed.model == running.model == running.name == f"{MODEL_NAME}:latest"
    assert listed.digest == running.digest and len(listed.digest) == 64
    assert listed.modified_at.timestamp() == server.model.created_unix
    assert listed.details.family == "phi3"
    assert running.context_length == MAX_SEQUENCE_TOKENS
    shown = client.show(MODEL_NAME)
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo["phi3.context_length"] == MAX_SEQUENCE_TOKENS
    assert shown.details == listed.details
    for end in ("<|im_end|>", "<|endoftext|>"):
        assert f'"{end}"' in shown.parameters
    assert turns(tokenizer) and "{{ .Content }}" in shown.template


def test_fields_without_an_effect_are_accepted(client: ollama.Client, sampler: Asked) -> None:
    loaded = {"num_gpu": 1, "num_thread": 8, "use_mmap": True, "num_ctx": MAX_SEQUENCE_TOKENS}
    off = {"repeat_penalty": 1.0, "mirostat": 0, "tfs_z": 1.0, "presence_penalty": 0.0}
    options = ollama.Options(**GREEDY, **loaded, **off)
    reply = client.generate(MODEL_NAME, "Why?", options=options, keep_alive="5m", format="")
    assert reply.response == "Because."
    assert sampler.requests[-1].temperature == 0.0
