"""The emulator of Gluon on Hopper: right where a protocol holds, red where one step is wrong.

Each mutant is one of the kernel below, and each must be found in every schedule: what
orders two accesses does not depend on which of them happened to come first.
"""

import pytest
import torch
from phi4_kernels.errors import GateError
from phi4_kernels.testing.gluon.emulator import emulating
from phi4_kernels.testing.gluon.machine import ORDERS, Schedule
from phi4_kernels.testing.gluon.values import Descriptor, Pointer, Value
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SIDE = 16
BLOCKS = 5
SCHEDULES = [*map(Schedule, ORDERS), Schedule("shuffled", 1)]


@gluon.jit
def _load(x_desc, buffers, full, empty, FAULT: gl.constexpr, SLOTS: gl.constexpr):
    for block in range(BLOCKS):
        slot, phase = block % SLOTS, block // SLOTS & 1
        if FAULT != "no wait for empty":
            mbarrier.wait(empty.index(slot), phase ^ 1)
        num_bytes = x_desc.block_type.nbytes
        if FAULT == "too few bytes":
            num_bytes = num_bytes // 2
        if FAULT == "too many bytes":
            num_bytes = num_bytes * 2
        if FAULT != "no expect":
            mbarrier.expect(full.index(slot), num_bytes)
        target = buffers.index(slot)
        if FAULT == "wrong slot":
            target = buffers.index((block + 1) % SLOTS)
        column = 4 if FAULT == "unaligned column" else 0
        tma.async_copy_global_to_shared(x_desc, [block * SIDE, column], full.index(slot), target)


@gluon.jit
def _multiply(out_ptr, buffers, full, empty, FAULT: gl.constexpr, SLOTS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    rows = gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    cols = gl.arange(0, SIDE, gl.SliceLayout(0, layout))
    for block in range(BLOCKS):
        slot, phase = block % SLOTS, block // SLOTS & 1
        if FAULT == "wrong parity":
            phase = phase ^ 1
        if FAULT != "no wait for full":
            mbarrier.wait(full.index(slot), phase)
        x = buffers.index(slot)
        if FAULT == "no fence":
            x.store(x.load(layout))
        if FAULT == "fence":
            x.store(x.load(layout))
            fence_async_shared()
        if FAULT == "load" or FAULT == "no fence after load" or FAULT == "fence after release":
            x.load(layout)
        acc = gl.zeros([SIDE, SIDE], gl.float32, layout)
        acc = warpgroup_mma(x, x, acc, use_acc=False, is_async=True)
        if FAULT == "release before the product is done":
            mbarrier.arrive(empty.index(slot), count=1)
        if FAULT == "result of a product in flight":
            acc = warpgroup_mma_wait(1, deps=(acc,))
        elif FAULT != "no wait for the product":
            acc = warpgroup_mma_wait(0, deps=(acc,))
        if FAULT == "two arrivals" or FAULT == "an arrival for nobody":
            mbarrier.arrive(empty.index(slot), count=1)
        if FAULT == "load":
            fence_async_shared()
        if FAULT != "no release" and FAULT != "release before the product is done":
            mbarrier.arrive(empty.index(slot), count=1)
        if FAULT == "fence after release":
            fence_async_shared()
        line = (block * SIDE + rows) * SIDE
        gl.store(out_ptr + line[:, None] + cols[None, :], acc)


@gluon.jit
def _square_kernel(x_desc, out_ptr, FAULT: gl.constexpr, SLOTS: gl.constexpr):
    """out = x x of each [SIDE, SIDE] block of x, through a ring of SLOTS."""
    buffers = gl.allocate_shared_memory(x_desc.dtype, [SLOTS, SIDE, SIDE], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        if FAULT != "no init":
            mbarrier.init(empty.index(slot), count=2 if FAULT == "two arrivals" else 1)
    if FAULT != "no fence after init":
        fence_async_shared()
    if FAULT == "copy left in flight":
        mbarrier.expect(full.index(0), x_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(x_desc, [0, 0], full.index(0), buffers.index(0))
    else:
        gl.warp_specialize(
            [
                (_multiply, (out_ptr, buffers, full, empty, FAULT, SLOTS)),
                (_load, (x_desc, buffers, full, empty, FAULT, SLOTS)),
            ],
            [1],
            [24],
        )


def descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(x, block, layout)


def run(fault: str, schedule: Schedule, slots: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BLOCKS * SIDE, SIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.full((BLOCKS * SIDE, SIDE), torch.nan)
    with emulating(schedule):
        _square_kernel[(1,)](descriptor(x, [SIDE, SIDE]), out, fault, slots)
    blocks = x.float().view(BLOCKS, SIDE, SIDE)
    return out, (blocks @ blocks).view_as(out)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("fault", ["", "fence", "load"])
def test_a_right_protocol_gives_right_numbers(fault: str, slots: int, schedule: Schedule) -> None:
    out, expected = run(fault, schedule, slots)
    assert torch.equal(out, expected)


FAULTS = {
    "no wait for full": "multiply 0 .* unordered with the copy that load 1|nothing has written",
    "wrong parity": "race: multiply 0 .* unordered with the copy|deadlock|nothing has written",
    "no wait for empty": "race: load 1 .* overwrites buffers|arrives at .* already has its arrival",
    "too few bytes": "full.*: 256 bytes landed that were not expected",
    "too many bytes": r"deadlock: .*full\[0\] \(phase 0 lacks 0 arrivals and 512 bytes\)",
    "no expect": "deadlock: .*lacks 1 arrivals and -512 bytes",
    "unaligned column": r"copies from \[0, 4\]; expected the last coordinate at a multiple of 16",
    "wrong slot": "race: .*buffers|deadlock|which nothing has written",
    "release before the product is done": r"race: load 1 .* overwrites .*, which multiply",
    "result of a product in flight": "warpgroup_mma_wait returns the product .* in flight",
    "no wait for the product": "is used .* in flight; expected the result of warpgroup_mma_wait",
    "an arrival for nobody": "deadlock|race",
    "two arrivals": "multiply 0 arrives .* already has its arrival",
    "no release": r"deadlock: .*load 1 .*empty\[0\] \(phase 0 lacks 1 arrivals",
    "no fence": "which _multiply:.* has stored to; expected fence_async_shared between",
    "no fence after load": "which _multiply:.* has loaded from; expected fence_async_shared",
    "fence after release": "which _multiply:.* has loaded from; expected fence_async_shared",
    "no fence after init": "asynchronously, which _square_kernel:.* has stored to",
    "no init": "empty.* is no barrier yet",
    "copy left in flight": r"the program ends with the copy into buffers\[0\] in flight",
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_mutant_is_found(fault: str, schedule: Schedule) -> None:
    with pytest.raises(GateError, match=FAULTS[fault]):
        run(fault, schedule)


def test_a_schedule_repeats() -> None:
    """The same seed reports the same step; a race found once can be looked at again."""
    messages = set()
    for _ in range(3):
        with pytest.raises(GateError) as caught:
            run("wrong slot", Schedule("shuffled", 3))
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize(("a", "b"), [(7, 2), (-7, 2), (7, -2), (-1, 128)])
def test_integers_divide_toward_zero(a: int, b: int) -> None:
    quotient = Value(torch.tensor(a, dtype=torch.int32)) // b
    remainder = Value(torch.tensor(a, dtype=torch.int32)) % b
    assert int(quotient) == int(a / b)
    assert int(quotient) * b + int(remainder) == a


def test_conversions_round_to_nearest_even() -> None:
    halves = Value(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16]))
    assert halves.to(gl.bfloat16).tensor.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_a_block_past_the_edge_is_filled_with_zeros() -> None:
    x = torch.arange(1, 13, dtype=torch.bfloat16).repeat_interleave(8).view(12, 8)
    block = Descriptor(descriptor(x, [8, 8])).block([8, 0])
    assert torch.equal(block[:4], x[8:]) and not block[4:].any()
    assert torch.equal(Descriptor(descriptor(x, [8, 8])).block([-2, 0])[2:], x[:6])


@pytest.mark.parametrize("offset", [-1, 6])
def test_leaving_a_tensor_is_an_error(offset: int) -> None:
    pointer = Pointer.of(torch.zeros(2, 3)) + Value(torch.tensor([0, offset]))
    with pytest.raises(GateError, match="of a tensor of 6 elements"):
        pointer.load(None, None)
    pointer.store(1.0, Value(torch.tensor([True, False])))


def test_what_the_emulator_lacks_is_refused() -> None:
    @gluon.jit
    def kernel(out_ptr):
        gl.store(out_ptr, gl.atomic_add(out_ptr, 1.0))

    with emulating(), pytest.raises(ValueError, match=r"gluon\.jit"):
        kernel[(1,)](torch.zeros(1))
