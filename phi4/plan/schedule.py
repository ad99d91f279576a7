"""Micro-batches in flight on a pipeline rank, found by simulating megatron-core's schedule."""

from collections.abc import Sequence


def num_warmup_passes(pp_rank: int, pp_size: int, num_chunks: int, num_microbatches: int) -> int:
    """Forward passes before a rank's first backward pass.

    Source: Narayanan et al. 2021, section 2.2; megatron-core's get_pp_rank_microbatches.
    """
    if num_chunks == 1:
        warmup = pp_size - pp_rank - 1
    else:
        warmup = 2 * (pp_size - pp_rank - 1) + (num_chunks - 1) * pp_size
    return min(warmup, num_microbatches * num_chunks)


def peak_in_flight(
    chunk_bytes: Sequence[int], *, pp_rank: int, pp_size: int, num_microbatches: int
) -> tuple[int, ...]:
    """Return the micro-batches in flight of each chunk at the moment of peak memory.

    Args:
        chunk_bytes: bytes that one micro-batch keeps in each of this rank's chunks.
        pp_rank: index of the pipeline rank.
        pp_size: pipeline ranks.
        num_microbatches: of a step on one data-parallel rank; with several chunks a multiple of
            pp_size.
    """
    num_chunks = len(chunk_bytes)
    warmup = num_warmup_passes(pp_rank, pp_size, num_chunks, num_microbatches)
    held = [0] * num_chunks
    best, peak = tuple(held), -1
    for forward in range(num_microbatches * num_chunks):
        held[chunk_of_pass(forward, pp_size, num_chunks)] += 1
        now = sum(count * size for count, size in zip(held, chunk_bytes, strict=True))
        if now > peak:
            best, peak = tuple(held), now
        if forward >= warmup:
            # Backward passes take the chunks in the opposite order.
            held[num_chunks - 1 - chunk_of_pass(forward - warmup, pp_size, num_chunks)] -= 1
    return best


def chunk_of_pass(index: int, pp_size: int, num_chunks: int) -> int:
    """Return the chunk of a rank's index-th forward pass: groups of pp_size micro-batches, chunk by
    chunk."""
    return index % (pp_size * num_chunks) // pp_size
