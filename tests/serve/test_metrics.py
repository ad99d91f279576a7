"""What Prometheus reads of a server: its own parser, and numbers that are known."""

import asyncio
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Request, SamplerLoad
from phi4.sampling.scripted import ScriptedSampler
from phi4.serve.counts import TrafficLoad
from phi4.serve.metrics import registry_of
from phi4.serve.timing import TokenRate
from phi4.serve.traffic import Traffic
from tests.support.served import WEIGHTS, LoadedSampler, served
from tests.support.waiting import LONG_SECONDS, wait_until

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})


def read(text: str) -> dict[str, float]:
    """Value by sample name and labels."""
    return {
        sample.name + "".join(f",{key}={value}" for key, value in sorted(sample.labels.items())): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def page(url: str, key: str) -> tuple[str, dict[str, float]]:
    request = HttpRequest(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urlopen(request, timeout=LONG_SECONDS) as answer:
        return answer.headers["Content-Type"], read(answer.read().decode())


async def ask(traffic: Traffic, *requests: Request) -> None:
    async for _ in traffic.ask(requests):
        pass


def test_page_counts_what_was_asked_and_needs_the_key() -> None:
    sampler = LoadedSampler(lambda ids: {65: 1.0}, TOKENIZER)
    with served(sampler, TOKENIZER, api_key="secret") as server:
        requests = [Request(prompt=(1, 2, 3), max_tokens=count, n=2) for count in (4, 5)]
        asyncio.run(ask(server.traffic, *requests))
        wait_until(lambda: not server.traffic.load.under_way, "the last step is noted")
        kind, found = page(server.url, "secret")
        assert kind == CONTENT_TYPE_LATEST
        assert {
            "phi4_requests_total,outcome=completed": 2,
            "phi4_requests_total,outcome=cancelled": 0,
            "phi4_requests_total,outcome=failed": 0,
            "phi4_requests_total,outcome=refused": 0,
            "phi4_prompt_tokens_total": 6,
            "phi4_new_tokens_total": 18,
            "phi4_reloads_total": 0,
            "phi4_requests_open": 0,
            "phi4_requests_running": 0,
            "phi4_requests_queued": 0,
            "phi4_cache_blocks": 9,
            "phi4_cache_blocks_in_use": 0,
            "phi4_first_token_seconds_count": 2,
            "phi4_between_tokens_seconds_count": 14,
            f"phi4_weights_info,name={WEIGHTS}": 1,
        }.items() <= found.items()
        with pytest.raises(HTTPError, match="401"):
            page(server.url, "guess")


def test_sampler_without_a_cache_has_no_blocks() -> None:
    with served(ScriptedSampler(lambda ids: {65: 1.0}, TOKENIZER), TOKENIZER) as server:
        _, found = page(server.url, "")
        assert "phi4_requests_running" in found
        assert not [name for name in found if "cache" in name]


def test_requests_wait_in_the_sampler_or_before_it() -> None:
    traffic = Traffic("weights")
    traffic.load = TrafficLoad(waiting=2, under_way=7, sampler=SamplerLoad(30, 40, 4, 3))
    found = read(generate_latest(registry_of(traffic)).decode())
    assert found["phi4_requests_running"] == 4
    assert found["phi4_requests_queued"] == 5
    assert (found["phi4_cache_blocks_in_use"], found["phi4_cache_blocks"]) == (30, 40)


def test_two_servers_of_a_process_count_apart() -> None:
    one, other = Traffic("one"), Traffic("other")
    one.timing.first_token.observe(0.3)
    pages = [read(generate_latest(registry_of(traffic)).decode()) for traffic in (one, other)]
    assert [found["phi4_first_token_seconds_count"] for found in pages] == [1, 0]
    assert pages[0]["phi4_first_token_seconds_bucket,le=0.25"] == 0
    assert pages[0]["phi4_first_token_seconds_bucket,le=0.5"] == 1


def test_rate_is_that_of_the_last_ten_whole_seconds() -> None:
    now = [100.0]
    rate = TokenRate(lambda: now[0])
    for second in range(100, 130):
        now[0] = second + 0.25
        rate.add(second)
        now[0] = second + 0.75
        rate.add(1)
        expected = [before + 1 for before in range(max(100, second - 10), second)]
        assert rate.per_second() == sum(expected) / 10
    now[0] = 135.0
    assert rate.per_second() == sum(second + 1 for second in range(125, 130)) / 10
    now[0] = 900.0
    assert rate.per_second() == 0
