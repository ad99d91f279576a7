"""A keyed pseudo-random permutation of 0 .. n - 1, computed instead of stored.

A Feistel network over the smallest near-square grid that holds n numbers; results outside n are
passed through the network again until they fall inside (cycle walking). Any element of a
permutation of 10^12 numbers costs the same few operations, without memory or start-up time.

Source: Black and Rogaway 2002, Ciphers with arbitrary finite domains (generalized Feistel).
"""

import hashlib
import math

import numpy as np

_NUM_ROUNDS = 8


def permutation_key(*parts: str | int) -> np.ndarray:
    """Return round keys, [8] uint64, derived from all parts and nothing else."""
    name = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(name.encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Return the images of some numbers under the permutation of 0 .. size - 1 with a key.

    Args:
        index: [n], integers in [0, size).
        size: length of the permutation, at most 2^62.
        key: from `permutation_key`.

    Returns:
        [n], int64.
    """
    assert size <= 1 << 62, size
    height = max(1, math.isqrt(size - 1) + 1)
    width = -(-size // height)
    result = index.astype(np.uint64)
    outside = np.arange(result.size)
    while outside.size:
        walked = _network(result[outside], np.uint64(height), np.uint64(width), key)
        result[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return result.astype(np.int64)


def _network(x: np.ndarray, height: np.uint64, width: np.uint64, key: np.ndarray) -> np.ndarray:
    """Apply the network once to the grid of height x width numbers: a bijection of the grid."""
    row, column = np.divmod(x, width)
    for round_key in key.reshape(-1, 2):
        row = (row + mix(column ^ round_key[0]) % height) % height
        column = (column + mix(row ^ round_key[1]) % width) % width
    return row * width + column


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
