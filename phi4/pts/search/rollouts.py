"""The interface of a search: the blocks it requests, and the rollouts it receives.

The search is a generator that yields blocks of completions and is sent their grades. It does not
depend on a sampler, oracle or store, so a simulation with known probabilities can replace a model,
and many questions can wait in one process.
"""

import hashlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import msgspec

from phi4.oracles.verdict import Grade


class Purpose(StrEnum):
    """Purpose of completions. Those of one purpose are never used for another."""

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
        forbidden: the token that may not follow it; None for none.
    """

    prefix: tuple[int, ...]
    forced: int | None = None
    forbidden: int | None = None


@dataclass(frozen=True)
class RolloutBlock:
    """Completions that are sampled together.

    Attributes:
        purpose: what they are for.
        start: where they begin.
        number: index of the block among those of its start and purpose.
        n: number of completions.
        along: ids that may follow the start; sampled tokens are compared with them.
    """

    purpose: Purpose
    start: Start
    number: int
    n: int
    along: tuple[int, ...] = ()


class Rollout(msgspec.Struct, frozen=True, array_like=True):
    """A completion with its grade.

    Attributes:
        grade: grade of the complete answer; wrong if it was truncated.
        first: the first new token, sampled or forced; `NO_TOKEN` without one.
        num_tokens: number of sampled tokens.
        num_followed: number of leading tokens that equal the block's `along`.
        is_truncated: whether it reached `max_tokens`.
        ids: ids of the completion; only for those that screen a question.
        log_probs: log probs of `ids` in the sampler's distribution.
    """

    grade: Grade
    first: int
    num_tokens: int
    num_followed: int = 0
    is_truncated: bool = False
    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()


NO_TOKEN = -1
"""First token of an empty completion whose end token an endpoint did not report."""

T = TypeVar("T")

Asks = Generator[Sequence[RolloutBlock], Sequence[Sequence[Rollout]], T]
"""Yields blocks, receives the rollouts of each, and returns a result."""


@dataclass(frozen=True)
class Share:
    """Successes among the gradable completions."""

    successes: int = 0
    trials: int = 0

    @property
    def value(self) -> float:
        """Successes per trial; NaN without trials, and no comparison with NaN finds a gap."""
        return self.successes / self.trials if self.trials else float("nan")


def share_of(rollouts: Iterable[Rollout]) -> Share:
    """Count successes and trials; ungradable ones are neither."""
    graded = [one.grade is Grade.RIGHT for one in rollouts if one.grade is not Grade.UNGRADABLE]
    return Share(sum(graded), len(graded))


def block_seed(seed: int, prompt: Sequence[int], block: RolloutBlock) -> int:
    """Return the seed of a block's request, from 0 to 2^63 - 1.

    Args:
        seed: seed of the search.
        prompt: ids of the question's prompt.
        block: a block, of which purpose, start and number matter.
    """
    start = block.start
    key = (seed, tuple(prompt), start.prefix, start.forced, start.forbidden)
    text = f"{key} {block.purpose} {block.number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
