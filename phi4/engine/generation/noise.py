"""Gumbel noise as a function of (seed, sample, position, token id), without state.

The stream of one draw is SplitMix64, which is a counter-based generator: output i is a mix of
`key + (i + 1) * gamma`, in 64-bit integer arithmetic that is exact on every device. The key is a
BLAKE2b hash, so streams of neighbouring seeds, samples and positions are uncorrelated. A
Philox round in int64 tensors costs about ten times the operations for the same use.
Source: Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 16.
"""

import hashlib
from collections.abc import Sequence

import torch

# Shape legend: R rows, V vocabulary.

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SIGNED_64 = 1 << 63


def stream_key(seed: int, sample: int, position: int) -> int:
    """Return the key of one draw's stream.

    Args:
        seed: seed of the request, any 64-bit integer, signed or not.
        sample: index among the request's samples.
        position: index of the token among the sample's new tokens.

    Returns:
        A signed 64-bit integer.
    """
    parts = (seed % (1 << 64), sample, position)
    packed = b"".join(part.to_bytes(8, "little") for part in parts)
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def random_bits(keys: Sequence[int], length: int, device: torch.device) -> torch.Tensor:
    """Return the first `length` outputs of each key's stream, [R, length] int64 (all 64 bits
    used)."""
    # Products and sums wrap around as unsigned ones do; the sign bit is one of the 64.
    steps_V = torch.arange(1, length + 1, device=device) * _signed(_GAMMA)
    z_RV = torch.tensor(list(keys), dtype=torch.int64, device=device).unsqueeze(1) + steps_V
    z_RV = (z_RV ^ _shifted(z_RV, 30)) * _signed(_MIX_1)
    z_RV = (z_RV ^ _shifted(z_RV, 27)) * _signed(_MIX_2)
    return z_RV ^ _shifted(z_RV, 31)


def gumbel(keys: Sequence[int], length: int, device: torch.device) -> torch.Tensor:
    """Return standard Gumbel noise [R, length], fp64, finite."""
    # 52 bits and a half: exact in fp64, and neither 0 nor 1.
    uniform_RV = (_shifted(random_bits(keys, length, device), 12).double() + 0.5) * 2.0**-52
    return -(-uniform_RV.log()).log()


def _shifted(z: torch.Tensor, count: int) -> torch.Tensor:
    """Return z >> count for unsigned integers: torch's shift repeats the sign bit."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - 2 * _SIGNED_64 if value >= _SIGNED_64 else value
