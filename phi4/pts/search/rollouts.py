"""What a search asks for, and what it is told.

The decision: the search is a generator that yields blocks of completions and is sent their grades.
It knows no sampler, oracle or store, so a world with known probabilities answers it as a model
does, and many questions wait in one process.
"""

import hashlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import msgspec

from phi4.oracles.verdict import Grade


class Purpose(StrEnum):
    """What completions are for. Those of one purpose are never used for another one."""

    SCREEN = "screen"
    TREE = "tree"
    CONFIRM = "confirm"
    COUNTERPART = "counterpart"


@dataclass(frozen=True)
class Start:
    """Where completions begin.

    Attributes:
        prefix: ids of the answer so far.
        forced: the token that follows it; None for any.
        forbidden: the token that does not follow it; None for none.
    """

    prefix: tuple[int, ...]
    forced: int | None = None
    forbidden: int | None = None


@dataclass(frozen=True)
class RolloutBlock:
    """Completions that are drawn together.

    Attributes:
        purpose: what for.
        start: where they begin.
        number: of the block among those of its start and purpose.
        n: completions.
        along: ids that may follow the start; what is drawn is compared with them.
    """

    purpose: Purpose
    start: Start
    number: int
    n: int
    along: tuple[int, ...] = ()


class Rollout(msgspec.Struct, frozen=True, array_like=True):
    """A completion with its grade.

    Attributes:
        grade: of the whole answer; wrong where it was cut off.
        first: the first new token, drawn or forced; `NO_TOKEN` without one.
        num_tokens: drawn.
        num_followed: tokens that it has in common with the block's `along`, from the first on.
        is_truncated: whether `max_tokens` cut it off.
        ids: of the completion; only of those that screen a question.
        log_probs: of `ids` in the sampler's distribution.
    """

    grade: Grade
    first: int
    num_tokens: int
    num_followed: int = 0
    is_truncated: bool = False
    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()


NO_TOKEN = -1
"""First token of a completion that is empty: an endpoint did not say what ended it."""

T = TypeVar("T")

Asks = Generator[Sequence[RolloutBlock], Sequence[Sequence[Rollout]], T]
"""Yields blocks, is sent the rollouts of each, and returns a result."""


@dataclass(frozen=True)
class Share:
    """Successes among the completions that could be graded."""

    successes: int = 0
    trials: int = 0

    @property
    def value(self) -> float:
        """Successes per trial; NaN without any, which is no gap to anything."""
        return self.successes / self.trials if self.trials else float("nan")


def share_of(rollouts: Iterable[Rollout]) -> Share:
    """Successes and trials; what cannot be graded is neither."""
    graded = [one.grade is Grade.RIGHT for one in rollouts if one.grade is not Grade.UNGRADABLE]
    return Share(sum(graded), len(graded))


def block_seed(seed: int, prompt: Sequence[int], block: RolloutBlock) -> int:
    """Seed of a block's request, from 0 to 2^63 - 1.

    Args:
        seed: of the search.
        prompt: ids of the question's prompt.
        block: any; its purpose, start and number count.
    """
    start = block.start
    key = (seed, tuple(prompt), start.prefix, start.forced, start.forbidden)
    text = f"{key} {block.purpose} {block.number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
