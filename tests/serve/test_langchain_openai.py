"""LangChain's clients of OpenAI's API run on this server as they are."""

from collections.abc import Iterator

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.chat import chat_prompt
from phi4.sampling.scripted import AnswerTable, ScriptedSampler
from tests.support.loopback import only_loopback
from tests.support.served import MODEL_NAME, Served, served

KEY = "secret"
TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text))


def turns(*said: tuple[Role, str]) -> tuple[int, ...]:
    return chat_prompt([Message(role, content) for role, content in said], TOKENIZER)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """Knows the answers to a few texts and conversations."""
    user, system, assistant = Role.USER, Role.SYSTEM, Role.ASSISTANT
    answers = {
        ids("Roses are"): "red, or so.",
        ids("Violets are"): "blue.",
        turns((user, "Why?")): "Because.",
        turns((system, "Be brief."), (user, "Why?")): "So.",
        turns((user, "What?"), (assistant, "B."), (user, "And?")): "Still.",
    }
    table = AnswerTable(
        {prompt: {ids(text): 1.0} for prompt, text in answers.items()}, TOKENIZER.im_end_id
    )
    sampler = ScriptedSampler(table, TOKENIZER, max_sequence_tokens=1024)
    with served(sampler, TOKENIZER, api_key=KEY) as running:
        yield running


@pytest.fixture(autouse=True)
def asked_hosts(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The clients find the server as they find OpenAI's; they may find nobody else."""
    monkeypatch.setenv("OPENAI_API_BASE", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with only_loopback() as hosts:
        yield hosts
    assert set(hosts) == {"127.0.0.1"}


def test_llm_completes_texts() -> None:
    llm = OpenAI(model=MODEL_NAME)
    assert llm.invoke("Roses are") == "red, or so."
    assert llm.batch(["Violets are", "Roses are"]) == ["blue.", "red, or so."]
    both = llm.generate(["Violets are", "Roses are"])
    assert [one.text for [one] in both.generations] == ["blue.", "red, or so."]
    assert both.llm_output["token_usage"]["prompt_tokens"] == len("Violets areRoses are")


def test_llm_streams_and_stops() -> None:
    llm = OpenAI(model=MODEL_NAME, temperature=0.0, seed=4)
    pieces = list(llm.stream("Roses are"))
    assert len(pieces) > 2 and "".join(pieces) == "red, or so."
    assert llm.invoke("Roses are", stop=[", or"]) == "red"
    assert "".join(llm.stream("Roses are", stop=[", or"])) == "red"


def test_chat_model_answers_a_conversation() -> None:
    chat = ChatOpenAI(model=MODEL_NAME, temperature=0.0, seed=1, max_tokens=20)
    reply = chat.invoke([SystemMessage("Be brief."), HumanMessage("Why?")])
    assert reply.content == "So."
    assert reply.response_metadata["finish_reason"] == "stop"
    asked = turns((Role.SYSTEM, "Be brief."), (Role.USER, "Why?"))
    assert reply.usage_metadata["input_tokens"] == len(asked)
    said = [HumanMessage("What?"), AIMessage("B."), HumanMessage("And?")]
    assert chat.invoke(said).content == "Still."


def test_chat_model_streams_with_and_without_usage() -> None:
    for stream_usage in (False, True):
        chunks = list(ChatOpenAI(model=MODEL_NAME, stream_usage=stream_usage).stream("Why?"))
        assert len(chunks) > 2 and "".join(chunk.content for chunk in chunks) == "Because."
        used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        assert bool(used) == stream_usage
