"""Convert blocks of a search to sampler requests, and completions to graded rollouts.

A completion continues from token ids, never from text, so a prefix that ends inside a character, or
whose text would be encoded differently, is preserved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.oracles.verdict import Grade, Graded, Oracle, ToGrade
from phi4.pts.search.rollouts import NO_TOKEN, Purpose, Rollout, RolloutBlock, block_seed
from phi4.sampling.protocol import Completion, FinishReason, Request
from phi4.sampling.questions import KeyedQuestion
from phi4.sampling.text import end_ids, text_pieces


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How completions of a search are drawn.

    Attributes:
        seed: seed of the search.
        max_tokens: maximum tokens of a complete answer.
        temperature: see `phi4.sampling.protocol.Request`.
        top_p: see `phi4.sampling.protocol.Request`.
    """

    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class AskedBlock:
    """A block of a question.

    Attributes:
        question: the question.
        block: the block to sample.
    """

    question: KeyedQuestion
    block: RolloutBlock


class BlockDrawing:
    """Makes requests for blocks, and their rollouts.

    Args:
        options: options of the search.
        tokenizer: tokenizer of the model.
        oracle: grades complete answers.
    """

    def __init__(self, options: DrawOptions, tokenizer: Tokenizer, oracle: Oracle) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._oracle = oracle
        self._stop_ids = end_ids(tokenizer)

    def request(self, asked: AskedBlock) -> Request:
        """Return the sampler request of a block; its prompt contains the prefix, to be computed
        once."""
        block, prompt = asked.block, asked.question.prompt
        start = block.start
        return Request(
            prompt=(*prompt, *start.prefix),
            max_tokens=self._options.max_tokens - len(start.prefix),
            n=block.n,
            temperature=self._options.temperature,
            top_p=self._options.top_p,
            seed=block_seed(self._options.seed, prompt, block),
            forced=() if start.forced is None else (start.forced,),
            forbidden_first=frozenset(() if start.forbidden is None else (start.forbidden,)),
            stop_ids=self._stop_ids,
            log_probs=block.purpose is Purpose.SCREEN,
        )

    def graded(
        self, drawn: Sequence[tuple[AskedBlock, Sequence[Completion]]]
    ) -> list[tuple[Rollout, ...]]:
        """Return the rollouts of blocks, graded in one batch."""
        to_grade = [
            ToGrade(self._text(asked, completion), asked.question.key)
            for asked, completions in drawn
            for completion in completions
            if _is_finished(completion)
        ]
        verdicts = iter(self._oracle.grade(to_grade) if to_grade else ())
        return [
            tuple(
                _rollout(asked.block, one, next(verdicts) if _is_finished(one) else None)
                for one in completions
            )
            for asked, completions in drawn
        ]

    def _text(self, asked: AskedBlock, completion: Completion) -> str:
        ids = (*asked.block.start.prefix, *(token.id for token in completion.tokens))
        return "".join(text_pieces(self._tokenizer, ids, self._stop_ids))


def _is_finished(completion: Completion) -> bool:
    """Return whether it ended: a truncated answer is wrong, regardless of its text."""
    return completion.finish_reason is FinishReason.STOP


def _rollout(block: RolloutBlock, completion: Completion, verdict: Graded | None) -> Rollout:
    ids = tuple(token.id for token in completion.tokens)
    is_screen = block.purpose is Purpose.SCREEN
    log_probs = (token.sampled_log_prob for token in completion.tokens)
    return Rollout(
        grade=Grade.WRONG if verdict is None else verdict.outcome,
        first=ids[0] if ids else NO_TOKEN,
        num_tokens=len(ids) - (block.start.forced is not None),
        num_followed=_num_common(ids, block.along),
        is_truncated=verdict is None,
        ids=ids if is_screen else (),
        log_probs=tuple(one for one in log_probs if one is not None) if is_screen else (),
    )


def _num_common(ids: Sequence[int], along: Sequence[int]) -> int:
    for number, (one, other) in enumerate(zip(ids, along, strict=False)):
        if one != other:
            return number
    return min(len(ids), len(along))
