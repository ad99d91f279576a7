"""A model with known pivots, an oracle for it, and what a search of it should find.

An answer is twelve tokens long. Its chance of being right is `START` until the token at `FORK`,
which is one of three, changes it; the token at `TURN` changes it again, and the one at `LAST`
decides. Around them stand tokens without an effect: a character in two tokens, and two tokens whose
text a tokenizer would encode as one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.oracles.verdict import Grade, Graded, ToGrade
from phi4.pts.search.drawing import DrawOptions
from phi4.sampling.protocol import Completion, Event, Request
from phi4.sampling.questions import KeyedQuestion
from phi4.sampling.scripted import ScriptedSampler

LONGER_TOKENS = (b"ST", b"OP", b" cat sat", b"\xf0\x9f", b"the", b" end")
FORK, TURN, LAST = 4, 8, 10
NUM_TOKENS = 12
MAX_TOKENS = 16
GOOD, FAIR, BAD = map(ord, "gnb")
UP, DOWN = map(ord, "ud")
RIGHT, WRONG = map(ord, "RW")
BEHIND_FORK = {GOOD: (0.35, 0.85), FAIR: (0.3, 0.5), BAD: (0.35, 0.1)}
"""Probability of each token, and the chance of a right answer behind it."""

UP_PROBABILITY = 0.4
START = sum(q * p for q, p in BEHIND_FORK.values())


def small_tokenizer() -> Tokenizer:
    """Every byte under its own id, then longer tokens."""
    tokens = [bytes([value]) for value in range(256)] + list(LONGER_TOKENS)
    return Tokenizer({token: token_id for token_id, token in enumerate(tokens)})


def chances(answer: Sequence[int]) -> tuple[float, Mapping[int, float]]:
    """Chance that an answer becomes right, and the probabilities of its next token.

    Args:
        answer: ids so far, without the end.
    """
    p = START
    if len(answer) > FORK:
        p = BEHIND_FORK[answer[FORK]][1]
    if len(answer) > TURN:
        p = behind_turn(p)[answer[TURN]]
    if len(answer) > LAST:
        p = float(answer[LAST] == RIGHT)
    return p, _next(answer, p)


def behind_turn(p: float) -> dict[int, float]:
    """p behind either token, of which it is the mean."""
    spread = min(0.6, (1 - p) / (1 - UP_PROBABILITY), p / UP_PROBABILITY)
    return {UP: p + (1 - UP_PROBABILITY) * spread, DOWN: p - UP_PROBABILITY * spread}


def _next(answer: Sequence[int], p: float) -> Mapping[int, float]:
    match len(answer):
        case 0:
            return {0xC3: 0.5, 0xC4: 0.5}
        case 1:
            return {0xA9: 0.5, 0xAA: 0.5}
        case 2:
            return {ord("S"): 0.6, ord("x"): 0.4}
        case 3:
            return {ord("T"): 0.6, ord("y"): 0.4}
        case 4:
            return {token: q for token, (q, _) in BEHIND_FORK.items()}
        case 8:
            return {UP: UP_PROBABILITY, DOWN: 1 - UP_PROBABILITY}
        case 10:
            return {token: q for token, q in ((RIGHT, p), (WRONG, 1 - p)) if q > 0}
    return {ord("a"): 0.5, ord("c"): 0.5}


@dataclass(frozen=True)
class PlantedScript:
    """What a `ScriptedSampler` draws behind any prompt of `questions`."""

    tokenizer: Tokenizer

    def __call__(self, ids: tuple[int, ...]) -> Mapping[int, float]:
        answer = ids[PROMPT_TOKENS:]
        if len(answer) == NUM_TOKENS - 1:
            return {self.tokenizer.im_end_id: 1.0}
        return chances(answer)[1]


PROMPT_TOKENS = 2


def questions(num: int) -> tuple[KeyedQuestion, ...]:
    """Questions that all have the same answers."""
    return tuple(
        KeyedQuestion(f"q{i}", (ord("Q"), ord("0") + i), f"Q{i}", "R", "letters")
        for i in range(num)
    )


class LastLetterOracle:
    """The letter at `LAST` decides; a key of None cannot be graded."""

    name = "last letter"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.answers: list[str] = []

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        self.batches.append(len(answers))
        self.answers += [one.answer for one in answers]
        return [
            Graded(
                Grade.UNGRADABLE
                if one.key is None
                else (Grade.RIGHT if "R" in one.answer else Grade.WRONG)
            )
            for one in answers
        ]

    def close(self) -> None:
        """Nothing to end."""


class RecordingSampler(ScriptedSampler):
    """Remembers what it was asked, and what it answered."""

    def __init__(self, tokenizer: Tokenizer, script=None) -> None:
        super().__init__(script or PlantedScript(tokenizer), tokenizer)
        self.requests: list[Request] = []
        self.completions: list[Completion] = []

    def submit(self, request: Request) -> int:
        self.requests.append(request)
        return super().submit(request)

    def step(self) -> Sequence[Event]:
        happened = super().step()
        self.completions += [event for event in happened if isinstance(event, Completion)]
        return happened


def true_effects(answer: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Position and effect of every token that has one; `answer` without its end."""
    for position in range(len(answer)):
        effect = chances(answer[: position + 1])[0] - chances(answer[:position])[0]
        if not math.isclose(effect, 0, abs_tol=1e-12):
            yield position, effect


OPTIONS = DrawOptions(seed=3, max_tokens=MAX_TOKENS)
