"""Split an answer by log-probability.

Cuts are placed where the sampler was uncertain, not at fixed token counts. A piece of joint
probability Q cannot change p by more than 1 - Q, so equal shares of log-probability are equal
shares of the possible change.
"""

import math
from collections.abc import Sequence
from itertools import accumulate


def cuts(log_probs: Sequence[float], num_pieces: int) -> list[int]:
    """Return boundaries of pieces with equal shares of log-probability.

    Args:
        log_probs: [n], log-probabilities of the answer's tokens, none above 0.
        num_pieces: maximum number; a token is never split.

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
    """Return the position that halves a piece's log-probability, with at least one token on either
    side.

    Args:
        log_probs: log probs of the answer's tokens.
        begin: first token of the piece.
        end: position after its last token; at least two tokens.
    """
    half, so_far = -sum(log_probs[begin:end]) / 2, 0.0
    for position in range(begin, end - 1):
        so_far -= log_probs[position]
        if so_far >= half:
            return position + 1
    return end - 1


def joint_probability(log_probs: Sequence[float], begin: int, end: int) -> float:
    """Return the joint probability of a piece's tokens."""
    return math.exp(sum(log_probs[begin:end]))
