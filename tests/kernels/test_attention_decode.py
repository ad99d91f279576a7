"""Laws of attention over cached keys in PyTorch, and what is derived once for all layers."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phi4_kernels import errors
from phi4_kernels.attention import (
    BlockTable,
    Ranges,
    attention,
    attention_decode,
    attention_forward,
    torch_blocks,
    torch_decode,
)
from torch import Tensor

DIM, NUM_BLOCKS, SIZE = 16, 12, 4
TORCH = {"implementation": "torch"}


def drawn(num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, and a cache of 2."""
    generator = torch.Generator().manual_seed(num_queries)
    shapes = ((num_queries, 4), (NUM_BLOCKS * SIZE, 2), (NUM_BLOCKS * SIZE, 2))
    return tuple(torch.randn(*shape, DIM, generator=generator) for shape in shapes)


@st.composite
def drawn_tables(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """Blocks, which may be shared, lengths and numbers of queries."""
    count = draw(st.integers(0, 4))
    blocks = [draw(st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=4)) for _ in range(count)]
    lengths = [draw(st.integers(0, len(row) * SIZE)) for row in blocks]
    return blocks, lengths, [draw(st.sampled_from((0, 1, 1, 3))) for _ in blocks]


@settings(max_examples=20, deadline=None)
@given(drawn_tables(), st.booleans())
def test_keys_in_blocks_are_keys_in_a_row(
    table: tuple[list[list[int]], list[int], list[int]], causal: bool
) -> None:
    blocks, lengths, queries = table
    q, keys, values = drawn(sum(queries) + 1)
    slots = [
        row[key // SIZE] * SIZE + key % SIZE
        for row, length in zip(blocks, lengths, strict=True)
        for key in range(length)
    ]
    ends = list(accumulate(lengths, initial=0))
    ranges = Ranges.of(accumulate(queries, initial=0), ends[:-1], ends[1:])
    wanted = attention_forward(q, keys[slots], values[slots], ranges, causal=causal, **TORCH)
    paged = BlockTable.of(blocks, lengths, SIZE, queries)
    found = attention_decode(q, keys, values, paged, causal=causal, **TORCH)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sequences_of_one_query_are_padded_to_batches_that_do_not_mix() -> None:
    lengths, rows = [1, 2, 3, 12, 11], [[4], [3, 0], [7, 1], [5, 9, 2], [6, 8, 10]]
    q, keys, values = drawn(len(lengths))
    table = BlockTable.of(rows, lengths, SIZE)
    where = table.q_offsets, table.blocks, table.lengths
    assert [one.rows for one in torch_decode._padded(*where, SIZE)] == [slice(0, 3), slice(3, 5)]
    keys[rows[3][0] * SIZE] = torch.nan
    found = attention_decode(q, keys, values, table, **TORCH)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        slots = [row[key // SIZE] * SIZE + key % SIZE for key in range(length)]
        ranges = Ranges.of([0, 1], [0], [length])
        wanted = attention_forward(q[i : i + 1], keys[slots], values[slots], ranges, **TORCH)
        torch.testing.assert_close(found.out[i], wanted.out[0], equal_nan=True)
        torch.testing.assert_close(found.lse[i], wanted.lse[0], equal_nan=True)
    assert found.out[[0, 1, 2, 4]].isfinite().all()


def test_samples_read_their_prompt_once_and_merge() -> None:
    q, keys, values = drawn(3)
    whole = BlockTable.of([[7, 2, 5], [7, 2, 0], [7, 2, 9]], [10, 12, 9], SIZE)
    prompt = BlockTable.of([[7, 2]], [8], SIZE, [3])
    own = BlockTable.of([[5], [0], [9]], [2, 4, 1], SIZE)
    wanted = attention_decode(q, keys, values, whole, **TORCH)
    first = attention_decode(q, keys, values, prompt, causal=False, **TORCH)
    second = attention_decode(q, keys, values, own, **TORCH)
    total = torch.logaddexp(first.lse, second.lse)
    merged = sum(part.out * (part.lse - total).exp().unsqueeze(-1) for part in (first, second))
    torch.testing.assert_close(merged, wanted.out)
    torch.testing.assert_close(total, wanted.lse)


@pytest.fixture
def derivations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is derived, in order, while the test runs."""
    calls: list[str] = []

    def count(owner: object, name: str) -> None:
        genuine = getattr(owner, name)

        def counted(*args: object) -> object:
            calls.append(name)
            return genuine(*args)

        monkeypatch.setattr(owner, name, counted)

    count(Ranges, "_spans")
    count(BlockTable, "_span")
    for module in (torch_blocks, torch_decode):
        count(module, "blocks_of")
    return calls


def test_all_layers_share_one_validation_and_one_plan(derivations: list[str]) -> None:
    q, keys, values = drawn(3)
    ranges = Ranges.of([0, 3], [0], [9])
    derivations.clear()
    for _ in range(3):
        leaf = q.clone().requires_grad_()
        attention(leaf, keys, values, ranges, **TORCH).out.sum().backward()
    assert sorted(derivations) == ["_spans", "blocks_of"]
    derivations.clear()
    table = BlockTable.of([[1, 0]], [7], SIZE, [3])
    for _ in range(3):
        attention_decode(q, keys, values, table, **TORCH)
    assert sorted(derivations) == ["_span", "blocks_of"]


def test_a_table_that_is_written_again_is_derived_again() -> None:
    q, keys, values = drawn(1)
    table = BlockTable.of([[3, 1]], [5], SIZE)
    attention_decode(q, keys, values, table, **TORCH)
    table.blocks[0, 1], table.lengths[0] = 6, 8
    found = attention_decode(q, keys, values, table, **TORCH)
    wanted = attention_decode(q, keys, values, BlockTable.of([[3, 6]], [8], SIZE), **TORCH)
    assert torch.equal(found.out, wanted.out)
    table.lengths[0] = 9
    with pytest.raises(errors.PositionError, match=r"lengths are \[9\]; expected 0 to 8"):
        attention_decode(q, keys, values, table, **TORCH)


def test_boundaries_that_are_written_again_are_checked_again() -> None:
    q, keys, values = drawn(2)
    ranges = Ranges.of([0, 2], [0], [5])
    attention_forward(q, keys, values, ranges, **TORCH)
    ranges.k_ends[0] = NUM_BLOCKS * SIZE + 1
    with pytest.raises(errors.PositionError, match="key ranges span 0 to 49"):
        attention_forward(q, keys, values, ranges, **TORCH)


def table(**changed: object) -> BlockTable:
    """Two sequences of one query each, with some fields of the table changed."""
    fields = {
        "q_offsets": torch.tensor([0, 1, 2], dtype=torch.int32),
        "blocks": torch.tensor([[1, 2], [0, 0]], dtype=torch.int32),
        "lengths": torch.tensor([6, 1], dtype=torch.int32),
    }
    return BlockTable(**fields | {"block_tokens": SIZE, "max_length": 6} | changed)


Q, KEYS, VALUES = drawn(2)
BAD = {
    "blocks of another dtype": (
        lambda: table(blocks=torch.zeros(2, 2)),
        errors.DtypeError,
        "blocks is torch.float32",
    ),
    "blocks in a row": (
        lambda: table(blocks=torch.zeros(4, dtype=torch.int32)),
        errors.ShapeError,
        r"blocks has shape \(4,\)",
    ),
    "blocks of no slots": (
        lambda: table(block_tokens=0),
        errors.ShapeError,
        "block_tokens is 0",
    ),
    "a length too few": (
        lambda: table(lengths=torch.tensor([1], dtype=torch.int32)),
        errors.ShapeError,
        r"lengths has shape \(1,\)",
    ),
    "a length beyond the blocks": (
        lambda: BlockTable.of([[0]], [SIZE + 1], SIZE),
        errors.PositionError,
        r"lengths are \[5\]; expected 0 to 4",
    ),
    "a block below zero": (
        lambda: BlockTable.of([[0, -1]], [SIZE + 1], SIZE),
        errors.PositionError,
        "block -1",
    ),
    "descending queries": (
        lambda: BlockTable.of([[0], [1]], [1, 1], SIZE, [1, -1]),
        errors.PositionError,
        r"q_offsets are \[0, 1, 0\]",
    ),
    "a block beyond the cache": (
        lambda: attention_decode(Q, KEYS[: 2 * SIZE], VALUES[: 2 * SIZE], table()),
        errors.PositionError,
        "block 2; expected blocks of 4 slots within 8",
    ),
    "fewer queries than the table's": (
        lambda: attention_decode(Q[:1], KEYS, VALUES, table()),
        errors.PositionError,
        "q_offsets end at 2; expected at most 1",
    ),
    "values unlike keys": (
        lambda: attention_decode(Q, KEYS, VALUES[1:], table()),
        errors.ShapeError,
        "v has shape",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_typed_error_with_a_remedy(case: str) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text) as raised:
        call()
    assert "\n" not in str(raised.value) and ";" in str(raised.value)
