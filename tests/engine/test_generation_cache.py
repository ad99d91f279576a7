"""Attention over cached keys equals attention over whole sequences."""

from types import SimpleNamespace

import pytest
import torch
from phi4_kernels.attention import Ranges, attention_forward

from phi4.engine.generation.blocks import BlockPool
from phi4.engine.generation.cache import KeyValueCache, StepAttention
from phi4.engine.generation.steps import StepRow

SIZE, HEADS, GROUPS, DIM = 4, 4, 2, 16
CPU, LAYER = torch.device("cpu"), 7
OPTIONS = {"scale": 0.3, "implementation": "torch"}
CORE = SimpleNamespace(layer_number=LAYER, **OPTIONS)


def make_cache(num_blocks: int) -> KeyValueCache:
    return KeyValueCache((LAYER, 8), num_blocks, SIZE, GROUPS, DIM, torch.float32, CPU)


def drawn(length: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((length, HEADS, DIM), (length, GROUPS, DIM), (length, GROUPS, DIM))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    ranges = Ranges.of([0, len(q)], [0], [len(q)])
    return attention_forward(q, k, v, ranges, **OPTIONS).out


@pytest.mark.parametrize("chunk", [1, 3, 5, 30])
def test_chunks_of_several_sequences_equal_whole_sequences(chunk):
    lengths, pool, cache = (13, 1, 9, 9), BlockPool(16, SIZE), make_cache(16)
    tensors = [drawn(length, seed) for seed, length in enumerate(lengths)]
    ask = {"num_samples": 1, "max_new_tokens": 1}
    held = [pool.admit(range(n), weights_key=i, **ask) for i, n in enumerate(lengths)]
    found = [[] for _ in lengths]
    while any(len(one.tokens) < length for one, length in zip(held, lengths, strict=True)):
        rows = []
        for i, (one, length) in enumerate(zip(held, lengths, strict=True)):
            start, end = len(one.tokens), min(len(one.tokens) + chunk, length)
            pool.extend(one, range(start, end))
            if start < end:
                rows.append((StepRow(range(start, end), start, one.blocks), i, start, end))
        rows.sort(key=lambda row: len(row[0].tokens) > 1)
        step = StepAttention(cache, [row for row, *_ in rows])
        new = [torch.cat([tensors[i][j][a:b] for _, i, a, b in rows]) for j in range(3)]
        out = step.attend(CORE, *new)
        parts = out.split([len(row.tokens) for row, *_ in rows])
        for (_, i, _, _), part in zip(rows, parts, strict=True):
            found[i].append(part)

    for parts, qkv in zip(found, tensors, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole(*qkv), rtol=1e-5, atol=1e-6)
    assert not cache.keys[8].any()


def test_samples_that_share_a_prompt_write_behind_copies_of_it():
    pool, cache = BlockPool(16, SIZE), make_cache(16)
    prompt, ends = drawn(6, 0), [drawn(3, seed) for seed in (1, 2, 3)]
    first = pool.admit(range(6), num_samples=3, max_new_tokens=4, weights_key=0)
    pool.extend(first, range(6))
    StepAttention(cache, [StepRow(range(6), 0, first.blocks)]).attend(CORE, *prompt)
    samples = [first, pool.fork(first), pool.fork(first)]
    for i in range(3):
        cache.copy([copy for one in samples if (copy := pool.extend(one, [i])) is not None])
        rows = [StepRow([i], 6 + i, one.blocks) for one in samples]
        new = [torch.cat([end[j][i : i + 1] for end in ends]) for j in range(3)]
        out = StepAttention(cache, rows).attend(CORE, *new)
        for row, end in enumerate(ends):
            both = [torch.cat((a, b[: i + 1])) for a, b in zip(prompt, end, strict=True)]
            torch.testing.assert_close(out[row], whole(*both)[-1], rtol=1e-5, atol=1e-6)
    assert pool.num_in_use == 1 + 3 * 2


def test_rows_with_one_new_token_come_first():
    rows = [StepRow([1, 2], 0, [0]), StepRow([1], 2, [1])]
    with pytest.raises(ValueError, match="must come before"):
        StepAttention(make_cache(2), rows)


def test_rows_that_share_blocks_get_what_they_get_alone():
    generator = torch.Generator().manual_seed(0)
    cache = make_cache(200)
    for kept in (cache.keys[LAYER], cache.values[LAYER]):
        kept.copy_(torch.randn(kept.shape, generator=generator))
    prefix, other = tuple(range(40)), tuple(range(50, 110))
    rows = [StepRow([1], 161 + i % 2, (*prefix, 41 + i)) for i in range(6)]
    rows.insert(3, StepRow([1], 165, (*prefix[:30], *range(120, 132))))
    rows += [StepRow([1], 9, (140, 141, 142))]
    rows += [StepRow([1], 240, (*other, 150 + i)) for i in range(4)]
    new = [torch.cat([part[:1]] * len(rows)) * 0.5 for part in drawn(1, 1)]
    new = [part + torch.randn(part.shape, generator=generator) for part in new]
    together, alone = (StepAttention(cache, rows, flag) for flag in (False, True))

    assert [len(part._parts) for part in together._parts] == [2]
    assert all(len(part._parts) == 1 for part in alone._parts)
    found, expected = together.attend(CORE, *new), alone.attend(CORE, *new)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
