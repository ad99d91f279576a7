"""Cutting an answer by log-probability.

The decision: pieces are cut where the sampler hesitated, not where tokens are. A piece of joint
probability Q cannot change p by more than 1 - Q, so equal shares of log-probability are equal
shares of what can happen.
"""

import math
from collections.abc import Sequence
from itertools import accumulate


def cuts(log_probs: Sequence[float], num_pieces: int) -> list[int]:
    """Borders of pieces with equal shares of log-probability.

    Args:
        log_probs: [n], of the answer's tokens, none above 0.
        num_pieces: at most; a token is never split.

    Returns:
        Ascending positions, from 0 to n.
    """
    surprise = [0.0, *accumulate(-one for one in log_probs)]
    borders = {0, len(log_probs)}
    for piece in range(1, num_pieces):
        aim = surprise[-1] * piece / num_pieces
        borders.add(next(i for i, so_far in enumerate(surprise) if so_far >= aim))
    return sorted(borders)


def midpoint(log_probs: Sequence[float], begin: int, end: int) -> int:
    """Position that halves a piece's log-probability, with a token at least on either side.

    Args:
        log_probs: of the answer's tokens.
        begin: first token of the piece.
        end: behind its last token; at least two tokens.
    """
    half, so_far = -sum(log_probs[begin:end]) / 2, 0.0
    for position in range(begin, end - 1):
        so_far -= log_probs[position]
        if so_far >= half:
            return position + 1
    return end - 1


def joint_probability(log_probs: Sequence[float], begin: int, end: int) -> float:
    """Of a piece's tokens, each behind the ones before it."""
    return math.exp(sum(log_probs[begin:end]))
