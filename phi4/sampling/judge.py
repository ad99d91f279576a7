"""Query a judge: collect valid replies, and retry invalid ones.

Only the judge's own completion is read. An invalid reply is requested again with another seed;
after all attempts the showing has no opinion, which is neither a win nor a tie.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.batch import answers
from phi4.sampling.chat import chat_prompt
from phi4.sampling.judge_prompt import JudgePrompt, Showing
from phi4.sampling.judge_replies import ReplyStore, reply_key
from phi4.sampling.judge_reply import Opinion, OpinionError, read_opinion
from phi4.sampling.protocol import Request, Sampler
from phi4.sampling.text import completion_text, end_ids


@dataclass(frozen=True)
class JudgeSampling:
    """Sampling parameters of replies.

    Attributes:
        max_tokens: maximum tokens of a reply.
        temperature: temperature of the first attempt.
        retry_temperature: temperature of the others; at 0 they would repeat the first one.
        seed: seed of the first attempt; each later one adds 1.
        max_prompt_tokens: longer prompts are skipped; 0 means the model's own limit.
    """

    max_tokens: int
    temperature: float
    retry_temperature: float
    seed: int
    max_prompt_tokens: int = 0


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply.

    Attributes:
        text: text of the judge's completion.
        fault: why the judge could not be queried; empty if it could.
    """

    text: str
    fault: str = ""


class Judge(Protocol):
    """A source of replies to showings.

    Attributes:
        identity: distinguishes it from other judges.
    """

    identity: str

    def replies(
        self, showings: Mapping[int, Showing], attempt: int
    ) -> Iterator[tuple[int, JudgeReply]]:
        """Yield a reply to each showing under its key, in any order.

        Args:
            showings: by a number chosen by the caller.
            attempt: 0, then 1 and so on after invalid replies.
        """


@dataclass(frozen=True)
class Refused:
    """An invalid reply."""

    text: str
    reason: str


@dataclass(frozen=True)
class Heard:
    """Result of a showing.

    Attributes:
        opinion: None if no attempt was valid.
        refused: the invalid attempts.
    """

    opinion: Opinion | None
    refused: tuple[Refused, ...]


def hear(judge: Judge, showings: Sequence[Showing], retries: int) -> list[Heard]:
    """Return the opinions of a judge, in the order of the showings.

    Args:
        judge: queried once per showing, and again after invalid replies.
        showings: showings for the judge.
        retries: maximum number of further attempts.
    """
    opinions: dict[int, Opinion] = {}
    refused: dict[int, list[Refused]] = {index: [] for index in range(len(showings))}
    left = dict(enumerate(showings))
    for attempt in range(retries + 1):
        if not left:
            break
        # A list, because `left` changes while replies arrive.
        for index, reply in judge.replies(dict(left), attempt):
            if reply.fault:
                refused[index].append(Refused(reply.text, reply.fault))
                del left[index]
                continue
            try:
                opinions[index] = read_opinion(reply.text, showings[index])
                del left[index]
            except OpinionError as error:
                refused[index].append(Refused(reply.text, str(error)))
    return [Heard(opinions.get(index), tuple(said)) for index, said in refused.items()]


class ModelJudge:
    """A judge that is a model; see `Judge`.

    Args:
        sampler: over the model.
        tokenizer: tokenizer of the model.
        identity: identity of the model.
        prompt: template of its prompt.
        sampling: sampling parameters.
        store: stores its replies.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: Tokenizer,
        identity: str,
        *,
        prompt: JudgePrompt,
        sampling: JudgeSampling,
        store: ReplyStore,
    ) -> None:
        self.identity = identity
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._sampling = sampling
        self._store = store

    def replies(
        self, showings: Mapping[int, Showing], attempt: int
    ) -> Iterator[tuple[int, JudgeReply]]:
        """See `Judge.replies`; stored replies are not requested again."""
        asked: list[tuple[int, str, str, Request]] = []
        for index, showing in showings.items():
            text = self._prompt.text(showing)
            request = self._request(text, attempt)
            if fault := self._too_long(request):
                yield index, JudgeReply("", fault)
                continue
            key = reply_key(self.identity, request.prompt, _drawn_by(request), attempt)
            stored = self._store.find(key)
            if stored is None:
                asked.append((index, key, text, request))
            else:
                yield index, JudgeReply(stored)
        for answer in answers(self._sampler, (request for *_, request in asked)):
            index, key, text, request = asked[answer.index]
            reply = completion_text(self._tokenizer, request, answer.completions[0])
            self._store.add(key, judge=self.identity, attempt=attempt, prompt=text, reply=reply)
            yield index, JudgeReply(reply)

    def _request(self, text: str, attempt: int) -> Request:
        sampling = self._sampling
        return Request(
            prompt=chat_prompt((Message(Role.USER, text),), self._tokenizer),
            max_tokens=sampling.max_tokens,
            temperature=sampling.retry_temperature if attempt else sampling.temperature,
            seed=sampling.seed + attempt,
            stop_ids=end_ids(self._tokenizer),
        )

    def _too_long(self, request: Request) -> str:
        num_tokens, limit = len(request.prompt), self._sampling.max_prompt_tokens
        longest = self._sampler.limits.max_sequence_tokens
        if longest is not None:
            left = max(0, longest - request.max_tokens)
            limit = min(limit, left) if limit else left
        elif not limit:
            return ""
        return f"prompt of {num_tokens} tokens; the limit is {limit}" if num_tokens > limit else ""


def _drawn_by(request: Request) -> dict[str, object]:
    """Return what a reply depends on in addition to judge and prompt."""
    return {name: getattr(request, name) for name in ("max_tokens", "temperature", "seed")}
