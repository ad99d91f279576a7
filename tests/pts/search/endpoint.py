"""An OpenAI-compatible endpoint on loopback that answers from a script, as vLLM would."""

from collections.abc import Callable, Iterator, Mapping

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import FinishReason, Request
from phi4.sampling.scripted import Script, ScriptedSampler
from tests.sampling.conformance import completions, run

Reply = Callable[[str, dict], Iterator[dict | bytes]]


def replying(script: Script, tokenizer: Tokenizer, lacks: str = "") -> Reply:
    """A reply to /completions.

    Args:
        script: of the model.
        tokenizer: of the ids.
        lacks: `token_ids`, `logprobs` or `logit_bias`: what the server does not know.
    """

    def reply(path: str, body: dict) -> Iterator[dict | bytes]:
        sampler = ScriptedSampler(_biased(script, body, lacks), tokenizer)
        request = Request(
            prompt=tuple(body["prompt"]),
            max_tokens=body["max_tokens"],
            n=body["n"],
            seed=body["seed"],
            stop_ids=frozenset(body.get("stop_token_ids") or ()),
            log_probs=True,
        )
        for ended in completions(run(sampler, request)[0]):
            stopped = ended.finish_reason is FinishReason.STOP
            choice: dict = {
                "index": ended.sample,
                "text": "?",
                "finish_reason": "stop" if stopped else "length",
            }
            if lacks != "token_ids":
                choice["token_ids"] = [token.id for token in ended.tokens]
            if "logprobs" in body and lacks != "logprobs":
                scored = [token.log_prob for token in ended.tokens]
                choice["logprobs"] = {"token_logprobs": scored, "top_logprobs": None}
            yield {"choices": [choice]}
        yield b"data: [DONE]"

    return reply


def _biased(script: Script, body: dict, lacks: str) -> Script:
    """A bias of -100 is a ban, at every position, as servers have it."""
    banned = {int(name) for name in body.get("logit_bias") or {}}

    def said(ids: tuple[int, ...]) -> Mapping[int, float]:
        chances = script(ids)
        if lacks == "logit_bias":
            return chances
        left = {token: p for token, p in chances.items() if token not in banned}
        total = sum(left.values())
        # A ban of all that the script says leaves what the server would make of it: anything.
        return {token: p / total for token, p in left.items()} if left else {0: 1.0}

    return said
