"""Chains of LangChain over Ollama run on this server as they are."""

import asyncio
from collections.abc import Iterator

import ollama
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_ollama import ChatOllama
from langchain_ollama.llms import OllamaLLM

from tests.serve.ollama_api.conftest import STEP_BY_STEP
from tests.support.loopback import only_loopback
from tests.support.served import MODEL_NAME, Served, served


@pytest.fixture(autouse=True)
def asked_hosts(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """LangChain finds the server as it finds Ollama; it may find nobody else."""
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    with only_loopback() as hosts:
        yield hosts


def test_chain_of_the_write_ups_runs_unchanged(sampler, tokenizer, monkeypatch) -> None:
    with served(sampler, tokenizer, name="vanilj/Phi-4") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)

        template = """Question: {question}

Answer: Let's think step by step."""
        prompt = ChatPromptTemplate.from_template(template)
        model = OllamaLLM(model="vanilj/Phi-4")
        chain = prompt | model

        assert chain.invoke({"question": "What is LangChain?"}) == "It is a library."
        pieces = list(chain.stream({"question": "What is LangChain?"}))
        assert len(pieces) > 2 and "".join(pieces) == "It is a library."
    asked = sampler.requests[-1]
    assert STEP_BY_STEP in tokenizer.decode(asked.prompt)
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.8, 0.9, 40)


def test_llm_takes_options_and_stops(sampler) -> None:
    model = OllamaLLM(model=MODEL_NAME, validate_model_on_init=True, temperature=0.0, seed=3)
    assert model.invoke("Spell", stop=["STOP"]) == " cat sat🙂"
    asked = sampler.requests[-1]
    assert (asked.temperature, asked.seed, asked.stop_strings) == (0.0, 3, (b"STOP",))


def test_chat_model_answers_a_conversation(sampler) -> None:
    model = ChatOllama(
        model=MODEL_NAME, validate_model_on_init=True, temperature=0.5, seed=7, num_predict=20
    )
    reply = model.invoke([SystemMessage("Be brief."), HumanMessage("Why?")])
    assert reply.content == "So."
    assert reply.response_metadata["done_reason"] == "stop"
    asked = sampler.requests[-1]
    assert reply.usage_metadata["input_tokens"] == len(asked.prompt)
    assert reply.usage_metadata["output_tokens"] == len("So.") + 1
    assert (asked.temperature, asked.seed, asked.max_tokens) == (0.5, 7, 20)
    said = [HumanMessage("What?"), AIMessage("B."), HumanMessage("And?")]
    chunks = list(model.stream(said))
    assert len(chunks) > 2 and "".join(chunk.content for chunk in chunks) == "Still."


def test_chat_model_stops_and_repeats_its_seed() -> None:
    model = ChatOllama(model=f"{MODEL_NAME}:latest", validate_model_on_init=True, seed=5)
    assert model.invoke("Spell", stop=["STOP"]).content == " cat sat🙂"
    assert model.invoke("Toss").content == model.invoke("Toss").content


async def _asked_at_once(model: ChatOllama) -> list[str]:
    replies = await model.abatch(["Why?", "Spell"], stop=["STOP"])
    return [reply.content for reply in replies]


def test_chat_model_asks_at_once() -> None:
    replies = asyncio.run(_asked_at_once(ChatOllama(model=MODEL_NAME)))
    assert replies == ["Because.", " cat sat🙂"]


def test_models_that_are_not_there_are_refused_at_the_start() -> None:
    for make in (ChatOllama, OllamaLLM):
        with pytest.raises(ValueError, match=rf"`phi-5` not found .*{MODEL_NAME}:latest"):
            make(model="phi-5", validate_model_on_init=True)


def test_tools_and_forms_are_refused_aloud() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    model = ChatOllama(model=MODEL_NAME)
    with pytest.raises(ollama.ResponseError, match=r"tools=.* is not supported"):
        model.bind_tools([tool]).invoke("Why?")
    with pytest.raises(ollama.ResponseError, match="format='json' is not supported"):
        ChatOllama(model=MODEL_NAME, format="json").invoke("Why?")


def test_requests_to_others_would_be_seen(asked_hosts: list[str]) -> None:
    ChatOllama(model=MODEL_NAME).invoke("Why?")
    assert set(asked_hosts) == {"127.0.0.1"}
    with (
        ollama.Client(host="http://192.0.2.1:11434") as elsewhere,
        pytest.raises(AssertionError, match=r"192\.0\.2\.1"),
        only_loopback(),
        pytest.raises(ConnectionError),
    ):
        elsewhere.list()
