"""A micro-batch on this rank's device: its context slice and its document boundaries.

Document boundaries are passed through megatron-core as `PackedSeqParams(qkv_format="sbhd")` over
the rows flattened in row order, with every row start a boundary. megatron's own `thd` form is never
used: its RoPE and context split assume that documents divide by the context size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from phi4.config import ModelConfig
from phi4.engine.forward_timer import ForwardTimer
from phi4.engine.layout import Layout
from phi4.engine.model.alternatives import AlternativeRows, alternative_rows
from phi4.engine.model.document_ranges import Visible, visible_keys
from phi4.engine.model.host_batch import HostBatch, work_of
from phi4.engine.model.placement import SideStream, on_device
from phi4.engine.model.rope import RopeCache, rope_cos_sin
from phi4.model.shape import Work

# Shape legend: B rows, S local columns (a context slice), T = S * B tokens, D head dim, D2 half of
# it, P positions.


@dataclass
class Documents(PackedSeqParams):
    """PackedSeqParams with this rank's RoPE tables and attention ranges.

    A dataclass of megatron-core's own kind, because it passes through its layers. RoPE has either
    tables per token, or a cache and positions.
    """

    cos_SBD: torch.Tensor | None = None
    sin_SBD: torch.Tensor | None = None
    rope_cache: RopeCache | None = None
    positions_T: torch.Tensor | None = None
    """int32, in the order of the flattened [S, B]."""
    visible: Visible = ()
    one_per_row: bool = False
    """Whether every row is one document held entirely by this rank."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the device; [B, S] are context slices, segments are complete."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    documents: Documents
    segment_ids_BS: torch.Tensor | None
    num_segments: int
    token_extras: Mapping[str, torch.Tensor]
    segment_extras: Mapping[str, torch.Tensor]
    alternatives: AlternativeRows | None


class MicroBatches:
    """The micro-batches of a step, copied to the device one ahead of use.

    A step's RoPE tables would fill gigabytes if they existed at the same time. Every model chunk
    iterates through the batches separately.

    Args:
        batches: batches on the host.
        to_device: copies one to the device.
        tick: called whenever a chunk takes a micro-batch.
        timer: measures the forward passes over them; None measures nothing.
        stream: stream of the copies.
    """

    def __init__(
        self,
        batches: Sequence[HostBatch],
        to_device: Callable[[HostBatch], MicroBatch],
        tick: Callable[[], None],
        timer: ForwardTimer | None,
        stream: SideStream,
    ) -> None:
        self._batches = batches
        self._to_device = to_device
        self._tick = tick
        self._timer = timer
        self._stream = stream

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        made = (self._stream.make(partial(self._to_device, batch)) for batch in self._batches)
        coming = next(made, None)
        while coming is not None:
            self._tick()
            batch, coming = coming(), next(made, None)
            yield batch

    def measured(self) -> AbstractContextManager[None]:
        """Measure one forward pass over one of them."""
        return self._timer.measured() if self._timer else nullcontext()

    @property
    def row_shape(self) -> tuple[int, int]:
        """Return (rows of a micro-batch, tokens of a complete row)."""
        return self._batches[0].tokens.shape

    @property
    def work(self) -> Work:
        """Work of all of them; context ranks share it, data ranks have their own."""
        return work_of(self._batches)

    @property
    def have_alternatives(self) -> list[bool]:
        """Whether each micro-batch has alternative labels."""
        return [batch.alternative_labels is not None for batch in self._batches]


def to_device(
    batch: HostBatch,
    layout: Layout,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rope_cache: RopeCache | None = None,
) -> MicroBatch:
    """Copy this rank's slice of a host batch to the device.

    Args:
        batch: complete rows.
        layout: determines this rank's slice.
        model: RoPE's base and width.
        dtype: dtype of the RoPE tables per token.
        device: target device.
        rope_cache: cache for RoPE; without it RoPE gets tables per token.

    Raises:
        ValueError: the rows do not split over the ranks, or are longer than the cache.
    """
    _check_length(batch.tokens.shape[1], layout, rope_cache)
    placed, positions_BS = on_device(_on_host(batch, layout), device)
    if rope_cache is None:
        cos, sin = rope_cos_sin(positions_BS.float(), model, dtype)
        documents = replace(placed.documents, cos_SBD=cos, sin_SBD=sin)
    else:
        positions_T = positions_BS.t().flatten()
        documents = replace(placed.documents, rope_cache=rope_cache, positions_T=positions_T)
    return replace(placed, documents=documents)


def _on_host(batch: HostBatch, layout: Layout) -> tuple[MicroBatch, torch.Tensor]:
    """Return this rank's slice as it will be on the device, without RoPE; positions [B, S],
    int32."""

    def slice_of(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return layout.context_slice(_as_tensor(array)).to(dtype)

    ids, second = batch.segment_ids, batch.alternative_labels
    labels_BS = slice_of(batch.labels, torch.int64)
    alternatives = None
    if second is not None:
        alternatives = alternative_rows(labels_BS, slice_of(second, torch.int64), layout)
    placed = MicroBatch(
        tokens_BS=slice_of(batch.tokens, torch.int64),
        labels_BS=labels_BS,
        loss_mask_BS=slice_of(batch.loss_mask, torch.float32),
        documents=_documents(batch, layout),
        segment_ids_BS=None if ids is None else slice_of(ids, torch.int64),
        num_segments=batch.num_segments,
        token_extras={k: slice_of(v, torch.float32) for k, v in batch.token_extras.items()},
        segment_extras={k: _as_tensor(v) for k, v in batch.segment_extras.items()},
        alternatives=alternatives,
    )
    return placed, slice_of(batch.positions, torch.int32)


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _check_length(length: int, layout: Layout, rope_cache: RopeCache | None) -> None:
    if length % layout.sequence_multiple:
        raise ValueError(f"rows of {length} tokens; need a multiple of {layout.sequence_multiple}")
    if rope_cache is not None and length > rope_cache.num_positions:
        raise ValueError(f"rows of {length} tokens; RoPE has {rope_cache.num_positions} positions")


def _documents(batch: HostBatch, layout: Layout) -> Documents:
    num_rows, length = batch.tokens.shape
    cu_seqlens = torch.from_numpy(np.asarray(batch.cu_seqlens, dtype=np.int32))
    longest = int(np.diff(batch.cu_seqlens).max())
    return Documents(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        visible=visible_keys(batch.cu_seqlens, num_rows, length, layout),
        one_per_row=len(batch.cu_seqlens) == num_rows + 1 and layout.cp_size == 1,
    )
