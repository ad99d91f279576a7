"""The sampling distribution of a request, and sampling from it, for the few tokens of a script.

This is the reference definition of `Request`'s fields; an engine does the same over full
vocabularies.
"""

import hashlib
import math
from collections.abc import Mapping

from phi4.sampling.protocol import Request

_NUM_BITS = 53
"""Bits of a float's mantissa: every uniform is exact."""


def sampled_log_probs(
    log_probs: Mapping[int, float], request: Request, is_first: bool
) -> dict[int, float]:
    """Return the log-probs of the tokens that remain to sample from, by id.

    Args:
        log_probs: log-probs of the raw model, finite; missing ids have probability 0.
        request: sampling parameters.
        is_first: whether it is the first new token.

    Returns:
        Empty if `forbidden_first` leaves nothing.
    """
    forbidden = request.forbidden_first if is_first else frozenset()
    scores = {
        token_id: log_prob + request.logit_bias.get(token_id, 0.0)
        for token_id, log_prob in log_probs.items()
        if token_id not in forbidden
    }
    likeliest = sorted(scores, key=lambda token_id: (-scores[token_id], token_id))
    if request.temperature == 0:
        return dict.fromkeys(likeliest[:1], 0.0)
    scores = {token_id: scores[token_id] / request.temperature for token_id in likeliest}
    kept = _nucleus(_normalized(_first(scores, request.top_k or len(scores))), request.top_p)
    if request.min_p > 0:
        floor = max(kept.values(), default=0.0) + math.log(request.min_p)
        kept = {token_id: score for token_id, score in kept.items() if score >= floor}
    return dict(sorted(_normalized(kept).items()))


def draw(log_probs: Mapping[int, float], seed: int, sample: int, position: int) -> int:
    """Sample a token by (seed, sample, position), independent of other sampling.

    Args:
        log_probs: normalized, at least one token.
        seed: seed of the request.
        sample: index of the sample.
        position: position of the token in the sequence.
    """
    digest = hashlib.blake2b(f"{seed} {sample} {position}".encode(), digest_size=8).digest()
    left = (int.from_bytes(digest) >> (64 - _NUM_BITS)) / (1 << _NUM_BITS)
    for token_id, log_prob in log_probs.items():
        left -= math.exp(log_prob)
        if left < 0:
            return token_id
    # Rounding: the probabilities may add up to slightly less than 1.
    return token_id


def _first(scores: dict[int, float], num_kept: int) -> dict[int, float]:
    return dict(list(scores.items())[:num_kept])


def _normalized(scores: dict[int, float]) -> dict[int, float]:
    """Log-softmax."""
    largest = max(scores.values(), default=0.0)
    total = math.fsum(math.exp(score - largest) for score in scores.values())
    return {token_id: score - largest - math.log(total) for token_id, score in scores.items()}


def _nucleus(log_probs: dict[int, float], top_p: float) -> dict[int, float]:
    """Return the first tokens whose mass reaches top_p."""
    mass, num_kept = 0.0, 0
    for log_prob in log_probs.values():
        if top_p < 1 and mass >= top_p:
            break
        mass += math.exp(log_prob)
        num_kept += 1
    return _first(log_probs, num_kept)
