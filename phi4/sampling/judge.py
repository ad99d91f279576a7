"""Asking a judge: replies as they come, and what becomes of those that are no opinions.

The decision: only the judge's own completion is ever read. A reply that is no opinion is asked for
again with another seed; when all attempts are spent, the showing has no opinion, which is neither a
win nor a tie.
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
    """How replies are drawn.

    Attributes:
        max_tokens: of a reply.
        temperature: of the first attempt.
        retry_temperature: of the others; at 0 they would all be the first one.
        seed: of the first attempt; each later one adds 1.
        max_prompt_tokens: a longer prompt is not asked; 0 leaves that to the model.
    """

    max_tokens: int
    temperature: float
    retry_temperature: float
    seed: int
    max_prompt_tokens: int = 0


@dataclass(frozen=True)
class JudgeReply:
    """What came back.

    Attributes:
        text: of the judge's completion.
        fault: why the judge could not be asked at all; empty where it was.
    """

    text: str
    fault: str = ""


class Judge(Protocol):
    """Somebody who replies to showings.

    Attributes:
        identity: tells it from other judges.
    """

    identity: str

    def replies(
        self, showings: Mapping[int, Showing], attempt: int
    ) -> Iterator[tuple[int, JudgeReply]]:
        """Yield a reply to each showing under its key, in any order.

        Args:
            showings: by a number of the caller's.
            attempt: 0, then 1 and so on for replies that were no opinions.
        """


@dataclass(frozen=True)
class Refused:
    """A reply that is no opinion."""

    text: str
    reason: str


@dataclass(frozen=True)
class Heard:
    """What came of a showing.

    Attributes:
        opinion: None where no attempt gave one.
        refused: the attempts that were no opinions.
    """

    opinion: Opinion | None
    refused: tuple[Refused, ...]


def hear(judge: Judge, showings: Sequence[Showing], retries: int) -> list[Heard]:
    """The opinions of a judge, in the order of the showings.

    Args:
        judge: asked once per showing, and again for those whose reply is no opinion.
        showings: what it sees.
        retries: further attempts at most.
    """
    opinions: dict[int, Opinion] = {}
    refused: dict[int, list[Refused]] = {index: [] for index in range(len(showings))}
    left = dict(enumerate(showings))
    for attempt in range(retries + 1):
        if not left:
            break
        # A list: `left` changes while replies come.
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
        tokenizer: of the model.
        identity: of the model.
        prompt: what it is shown.
        sampling: how it is asked.
        store: where its replies are kept.
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
        """See `Judge.replies`; what the store holds is not asked again."""
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
    """What a reply depends on beside judge and prompt."""
    return {name: getattr(request, name) for name in ("max_tokens", "temperature", "seed")}
