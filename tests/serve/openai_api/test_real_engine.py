"""The engine behind the server: exact probabilities of a Markov model, as HTTP tells them."""

from contextlib import closing

import pytest

from phi4.engine.generation.generator import Generator
from phi4.sampling.endpoint import Endpoint, PromptForm
from phi4.sampling.http import HttpSampler
from phi4.sampling.protocol import Event, Request, Sampler
from phi4.sampling.scripted import ScriptedSampler
from tests.sampling.conformance import run
from tests.sampling.test_local import (
    TOKENIZER,
    check_same,
    in_ranks,
    probabilities,
    wide_table,
)
from tests.serve.openai_api.known_model import asking
from tests.support.ranks import RankPool
from tests.support.served import MODEL_NAME, served

PROMPT = [3, 9, 30, 5]
GREEDY = {"prompt": tuple(PROMPT), "temperature": 0.0, "num_top_log_probs": 3, "log_probs": True}
REQUESTS = [
    Request(max_tokens=6, prompt_log_probs=True, n=2, **GREEDY),
    Request(max_tokens=4, forced=(7, 8), forbidden_first=frozenset((1,)), **GREEDY),
    Request(max_tokens=5, logit_bias={4: 30.0}, stop_strings=(b"STOP",), **GREEDY),
]


def test_http_tells_the_models_own_probabilities() -> None:
    with RankPool(1) as ranks:
        [(choices, found)] = ranks.run(in_ranks, (), wide_table(), asked_over_http)
    for choice in choices:
        ids, scored = [*PROMPT, *choice["token_ids"]], choice["logprobs"]
        rows = wide_table()[ids[:-1]].tolist()
        expected = [row[token] for row, token in zip(rows, ids[1:], strict=True)]
        assert scored["token_logprobs"][0] is None and len(expected) == 9
        assert scored["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
        highest = [max(top.values()) for top in scored["top_logprobs"][1:]]
        assert highest == pytest.approx(list(map(max, rows)), abs=1e-5)
    assert choices[0]["token_ids"] != choices[1]["token_ids"]
    scripted = ScriptedSampler(probabilities, TOKENIZER)
    for number, request in enumerate(REQUESTS):
        check_same(found[number], run(scripted, request)[0])


# What follows runs in a rank.


def asked_over_http(
    generator: Generator, sampler: Sampler
) -> tuple[list[dict], dict[int, list[Event]]]:
    with served(sampler, TOKENIZER) as server, asking(server) as client:
        fields = {"max_tokens": 6, "n": 2, "seed": 2, "echo": True, "logprobs": 2, "top_p": 0.9}
        choices = client.choices("completions", prompt=PROMPT, return_token_ids=True, **fields)
        where = Endpoint(base_url=f"{server.url}/v1", model=MODEL_NAME, form=PromptForm.PHI4)
        with closing(HttpSampler(where, TOKENIZER)) as over_http:
            return choices, run(over_http, *REQUESTS)
