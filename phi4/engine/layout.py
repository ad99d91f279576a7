"""The grid of ranks: which process holds which part of the model and of the batch.

Ranks are in Megatron's order, fastest first: tensor, context, data, pipeline. megatron-core keeps
its groups in module state; only this file creates and destroys them.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from phi4.config import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Degrees, this process's coordinates, and the process groups."""

    parallel: ParallelConfig
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    dp_size: int
    groups: ProcessGroupCollection

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return self.parallel.tensor

    @property
    def pp_size(self) -> int:
        """Pipeline ranks."""
        return self.parallel.pipeline

    @property
    def vpp_size(self) -> int:
        """Model chunks per pipeline rank."""
        return self.parallel.virtual_pipeline

    @property
    def cp_size(self) -> int:
        """Context-parallel ranks."""
        return self.parallel.context

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last model chunk, with the loss head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def sequence_multiple(self) -> int:
        """Divisor of row lengths."""
        chunks = 2 * self.cp_size if self.cp_size > 1 else 1
        return chunks * (self.tp_size if self.parallel.sequence else 1)

    @property
    def schedule_group(self) -> int:
        """Micro-batches that the schedule takes at a time: interleaved 1F1B needs complete
        groups."""
        return self.pp_size if self.vpp_size > 1 else 1

    def describe(self) -> str:
        """Return one line for the console."""
        p = self.parallel
        sequence = "+sequence" if p.sequence else ""
        virtual = f"x{p.virtual_pipeline} virtual" if p.virtual_pipeline > 1 else ""
        return (
            f"layout: tensor {p.tensor}{sequence}, pipeline {p.pipeline}{virtual}, "
            f"context {p.context}, data {self.dp_size}"
        )

    def context_chunks(self, length: int) -> list[tuple[int, int]]:
        """Return the global [start, end) ranges of a row that this context rank holds, in local
        order.

        Rank r of c holds chunks r and 2c-1-r of 2c, so that causal attention costs every rank the
        same (zig-zag; Llama 3 report, section 3.3.2). One rank holds the whole row.
        """
        return context_chunks(length, self.cp_rank, self.cp_size)

    def context_slice(self, x_BS: torch.Tensor) -> torch.Tensor:
        """Return the columns of [B, S] that this context rank holds, [B, S / cp]."""
        if self.cp_size == 1:
            return x_BS
        return torch.cat([x_BS[:, a:b] for a, b in self.context_chunks(x_BS.shape[1])], dim=1)

    def context_gather(self, x_BS: torch.Tensor) -> torch.Tensor:
        """Return complete rows [B, S, ...] from this rank's columns; inverse of `context_slice`.

        Collectives: one all-gather over cp of x_BS.
        """
        if self.cp_size == 1:
            return x_BS
        pieces = [torch.empty_like(x_BS) for _ in range(self.cp_size)]
        torch.distributed.all_gather(pieces, x_BS.contiguous(), group=self.groups.cp)
        halves = [piece.chunk(2, dim=1) for piece in pieces]
        ordered = [first for first, _ in halves] + [second for _, second in reversed(halves)]
        return torch.cat(ordered, dim=1)


def context_chunks(length: int, cp_rank: int, cp_size: int) -> list[tuple[int, int]]:
    """See `Layout.context_chunks`."""
    if cp_size == 1:
        return [(0, length)]
    size = length // (2 * cp_size)
    return [(i * size, (i + 1) * size) for i in (cp_rank, 2 * cp_size - 1 - cp_rank)]


def create_layout(parallel: ParallelConfig) -> Layout:
    """Create megatron-core's process groups for these degrees.

    Args:
        parallel: degrees; data parallelism uses the remaining ranks of the default group.

    Collectives: creates one group per axis and per pair of axes that megatron-core uses; every
    rank of the default group calls it.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        # Second groups, for host memory: only checkpoint formats that we do not use need them, and
        # on many nodes they may fail to connect (Megatron-LM issue 877).
        create_gloo_process_groups=False,
    )
    return Layout(
        parallel=parallel,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def destroy_layout() -> None:
    """Destroy megatron-core's process groups."""
    parallel_state.destroy_model_parallel()
