"""The definition of a draw for one row, in Python floats, without anything batched."""

import hashlib
import math
from collections.abc import Sequence

from phi4.engine.generation.draws import Draw, Drawn

_64_BITS = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The first outputs of the generator as its paper writes it, with a state."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _64_BITS
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _64_BITS
        outputs.append(z ^ (z >> 31))
    return outputs


def key_of(row: Draw) -> int:
    parts = (row.seed & _64_BITS, row.sample, row.position)
    packed = b"".join(part.to_bytes(8, "little") for part in parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def noise_of(row: Draw, count: int) -> list[float]:
    uniform = [((bits >> 12) + 0.5) / 2**52 for bits in splitmix64(key_of(row), count)]
    return [-math.log(-math.log(u)) for u in uniform]


def kept_probabilities(logits: Sequence[float], row: Draw) -> dict[int, float]:
    """{id: probability} of what a row with a temperature may draw."""
    allowed = {i: x + row.logit_bias.get(i, 0.0) for i, x in enumerate(logits)}
    allowed = {i: x for i, x in allowed.items() if i not in row.forbidden}
    peak = max(allowed.values())
    kept = _normalised({i: math.exp((x - peak) / row.temperature) for i, x in allowed.items()})
    least = row.min_p * max(kept.values())
    ranked = sorted(kept, key=lambda i: (-kept[i], i))[: row.top_k or None]
    nucleus, mass, target = [], 0.0, row.top_p * sum(kept[i] for i in ranked)
    for i in ranked:
        if nucleus and mass >= target and row.top_p < 1:
            break
        nucleus.append(i)
        mass += kept[i]
    return _normalised({i: kept[i] for i in nucleus if kept[i] >= least})


def reference_draw(logits: Sequence[float], row: Draw) -> Drawn:
    """What `draws.draw` gives for this row."""
    peak = max(logits)
    total = peak + math.log(sum(math.exp(x - peak) for x in logits))
    log_probs = [x - total for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-log_probs[i], i))
    top = tuple((i, log_probs[i]) for i in ranked[: row.num_top])
    if row.temperature == 0:
        scores = [x + row.logit_bias.get(i, 0.0) for i, x in enumerate(logits)]
        allowed = [i for i in range(len(logits)) if i not in row.forbidden]
        kept = {max(allowed, key=scores.__getitem__): 1.0}
    else:
        kept = kept_probabilities(logits, row)
    noise = noise_of(row, len(logits))
    token = max(kept, key=lambda i: math.log(kept[i]) + noise[i])
    token = token if row.forced is None else row.forced
    sampled = math.log(kept[token]) if token in kept else -math.inf
    return Drawn(token, log_probs[token], sampled, top)


def _normalised(weights: dict[int, float]) -> dict[int, float]:
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items() if weight > 0}
