"""In-flight counts against megatron-core's own schedule tables and 1F1B's closed form."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from phi4.plan.schedule import chunk_of_pass, num_warmup_passes, peak_in_flight


@given(data=st.data(), pp_size=st.integers(1, 8), num_microbatches=st.integers(1, 40))
def test_plain_pipeline_holds_one_per_stage_that_follows(data, pp_size, num_microbatches) -> None:
    pp_rank = data.draw(st.integers(0, pp_size - 1))
    (held,) = peak_in_flight(
        [10], pp_rank=pp_rank, pp_size=pp_size, num_microbatches=num_microbatches
    )
    assert held == min(pp_size - pp_rank, num_microbatches)


@given(
    data=st.data(),
    pp_size=st.integers(2, 6),
    num_chunks=st.integers(1, 4),
    groups=st.integers(1, 4),
)
def test_passes_are_megatrons(data, pp_size, num_chunks, groups) -> None:
    pp_rank, num_microbatches = data.draw(st.integers(0, pp_size - 1)), groups * pp_size
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pp_size, rank=lambda: pp_rank),
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
    )
    _, _, warmup, _ = get_pp_rank_microbatches(
        num_microbatches, num_chunks, pp_size, p2p_communicator=communicator
    )
    assert num_warmup_passes(pp_rank, pp_size, num_chunks, num_microbatches) == warmup
    table = get_schedule_table(num_microbatches, num_chunks, pp_size)
    ours = [chunk_of_pass(index, pp_size, num_chunks) for index in range(len(table))]
    assert ours == [chunk for _, chunk in table]


@pytest.mark.parametrize(
    ("pp_rank", "first_chunk_bytes", "held"),
    [(0, 10, (3, 2)), (0, 11, (4, 1)), (1, 10, (2, 1)), (1, 40, (3, 0))],
)
def test_interleaved_pipeline_of_two(
    pp_rank: int, first_chunk_bytes: int, held: tuple[int, int]
) -> None:
    # By hand, chunks a and b, capitals backward. Rank 0: a a b b | a B a B b A ...; rank 1:
    # a a | b B b B a A ... A heavy first chunk has its worst moment later.
    counts = peak_in_flight([first_chunk_bytes, 10], pp_rank=pp_rank, pp_size=2, num_microbatches=8)
    assert counts == held
