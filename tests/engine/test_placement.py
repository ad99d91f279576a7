"""Host values reach the device in one pinned copy, one micro-batch ahead of their turn."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch

from phi4.engine.model import placement
from phi4.engine.model.micro_batch import MicroBatches
from phi4.engine.model.placement import (
    SideStream,
    in_one_block,
    map_tensors,
    on_device,
    staging_block,
)

CPU = torch.device("cpu")


class Pair(NamedTuple):
    """As ranges are: tensors and numbers."""

    first: torch.Tensor | None
    longest: int


@dataclass(frozen=True)
class Nested:
    """As a micro-batch is."""

    whole: torch.Tensor
    again: torch.Tensor
    pairs: tuple[Pair, ...]
    extras: dict[str, torch.Tensor]
    absent: None = None


def nested() -> Nested:
    """Every dtype of a micro-batch; strided, empty and scalar ones, and one that occurs twice."""
    strided = torch.arange(12, dtype=torch.int64).view(3, 4).t()
    pairs = (Pair(torch.tensor([1, 2, 3], dtype=torch.int32), 7), Pair(None, 0))
    extras = {
        "mask": torch.tensor([True, False, True]),
        "scores": torch.rand(5, 3),
        "none": torch.empty(0, 2),
        "one": torch.tensor(2.5),
    }
    return Nested(strided, strided, pairs, extras)


def tensors_of(value: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(value, lambda x: (found.append(x), x)[1])
    return found


def same_contiguous(placed: Nested, value: Nested) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Check the values; the tensors of both, in pairs."""
    assert placed.pairs[0].longest == 7 and placed.pairs[1].first is None
    assert placed.whole is placed.again
    pairs = list(zip(tensors_of(placed), tensors_of(value), strict=True))
    for ours, given in pairs:
        assert ours.dtype is given.dtype and torch.equal(ours, given)
        assert ours.is_contiguous() and ours.data_ptr() % ours.itemsize == 0
    return pairs


def test_a_copy_has_the_values_in_one_block() -> None:
    value = nested()
    placed = in_one_block(value, {id(x): x.contiguous() for x in tensors_of(value)}, CPU)
    pairs = same_contiguous(placed, value)
    assert len({ours.untyped_storage().data_ptr() for ours, _ in pairs}) == 1


def test_a_gpu_gets_the_block() -> None:
    value, device = nested(), torch.device("cuda", 1)
    with mock.patch.object(placement, "in_one_block") as moved:
        assert on_device(value, device) is moved.return_value
    given, tensors, where = moved.call_args.args
    assert given is value and where == device
    assert tensors.keys() == {*map(id, tensors_of(value))}
    assert all(tensors[id(x)].is_contiguous() for x in tensors_of(value))
    assert all(tensors[id(x)].equal(x) for x in tensors_of(value))


def test_a_cpu_copies_only_what_has_gaps() -> None:
    value = nested()
    for ours, given in same_contiguous(on_device(value, CPU), value):
        assert (ours is given) == given.is_contiguous()


def test_what_a_gpu_copies_from_is_pinned() -> None:
    with mock.patch.object(torch, "empty") as empty:
        staging_block(8, torch.device("cuda", 1))
        staging_block(8, CPU)
    assert [call.kwargs["pin_memory"] for call in empty.call_args_list] == [True, False]


def test_a_micro_batch_is_placed_while_the_one_before_is_computed() -> None:
    said: list[str] = []

    def place(batch: int) -> int:
        said.append(f"place {batch}")
        return batch

    batches = MicroBatches([0, 1, 2], place, partial(said.append, "tick"), None, SideStream(CPU))
    for batch in batches:
        said.append(f"compute {batch}")
    assert said == [
        *("place 0", "tick", "place 1", "compute 0"),
        *("tick", "place 2", "compute 1", "tick", "compute 2"),
    ]


def test_the_stream_that_computes_waits_for_the_copy_and_keeps_its_memory() -> None:
    side, computing = mock.Mock(), mock.Mock()
    cuda = {
        "Stream": lambda device: side,
        "stream": lambda stream: said.append(stream) or nullcontext(),
        "current_stream": lambda device: computing,
    }
    said: list[object] = []
    value, kept = nested(), []
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(
            torch.Tensor, "record_stream", lambda x, stream: kept.append((x, stream)), create=True
        ),
    ):
        taken = SideStream(torch.device("cuda")).make(lambda: value)
        computing.wait_event.assert_not_called()
        assert said == [side] and taken() is value
    computing.wait_event.assert_called_once_with(side.record_event.return_value)
    assert all(x is y for (x, _), y in zip(kept, tensors_of(value), strict=True))
    assert all(stream is computing for _, stream in kept)
