"""What every op keeps to, whichever implementation runs it; see test_contracts."""

from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from phi4_kernels import registry
from phi4_kernels.attention import Ranges, attention, attention_backward, attention_forward
from phi4_kernels.cross_entropy import summed_linear_cross_entropy
from phi4_kernels.errors import KernelError
from phi4_kernels.registry import CallInputs, Case, Entry
from phi4_kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_fp8
from phi4_kernels.rope import QKVLayout, reference, rope_qkv, rope_tables
from phi4_kernels.testing import numerics

Gradients = tuple[torch.Tensor, ...] | None


def _entry(name: str, case: str) -> tuple[Entry, Case]:
    entry = registry.entries()[name]
    return entry, next(known for known in entry.proof_cases if known.name == case)


def _problem(name: str, case: str, implementation: str, dtype: torch.dtype) -> tuple[Any, ...]:
    entry, case = _entry(name, case)
    inputs = entry.make(case, dtype)
    function = partial(entry.function, implementation=implementation)
    return function, inputs, numerics.incoming(entry, case, inputs)


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; a vector's has a gap of NaN, or of large numbers, after each element."""
    if tensor.dim() != 1:
        return numerics.copied(tensor)
    gap = torch.nan if tensor.is_floating_point() else 1 << 20
    wide = torch.full((tensor.numel(), 2), gap, dtype=tensor.dtype)
    wide[:, 0] = tensor
    return wide[:, 0]


def strides_of_vectors_do_not_matter(entry: str, case: str, implementation: str) -> None:
    """Every 1-D tensor that goes in, incoming gradients included, may have gaps."""
    problem = _problem(entry, case, implementation, torch.bfloat16)
    dense = numerics.evaluate(*problem, numerics.copied)
    numerics.expect_same_bits(entry, dense, numerics.evaluate(*problem, _apart))


def autocast_changes_nothing(entry: str, case: str, implementation: str) -> None:
    """An op computes in the dtypes of its arguments, in forward and in backward."""
    problem = _problem(entry, case, implementation, torch.float32)
    plain = numerics.evaluate(*problem, numerics.copied)
    with torch.autocast("cpu", torch.bfloat16):
        numerics.expect_same_bits(entry, plain, numerics.evaluate(*problem, numerics.copied))


def _penalty(function: Any, inputs: CallInputs, gradients: Gradients) -> list[torch.Tensor]:
    """Gradients of a loss that holds the first derivatives of `function`, squared."""
    leaves = {name: numerics.copied(x).requires_grad_() for name, x in inputs.tensors.items()}
    outputs = numerics.outputs_of(function(**leaves, **inputs.constants))
    pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
    outputs, gradients = zip(*pairs, strict=True)
    first = torch.autograd.grad(outputs, list(leaves.values()), gradients, create_graph=True)
    # The second sum alone has a gradient: one that misses the first would raise no error.
    loss = sum(x.square().sum() for x in first) + sum(x.sum() for x in leaves.values())
    return list(torch.autograd.grad(loss, list(leaves.values())))


def second_derivatives_are_right_or_refused(entry: str, case: str, implementation: str) -> None:
    """Kernels are invisible to autograd: it must not take their gradients for constants."""
    function, inputs, gradients = _problem(entry, case, implementation, torch.float32)
    gradients = tuple(gradient.clamp(-1, 1) for gradient in gradients)
    try:
        found = _penalty(function, inputs, gradients)
    except KernelError as error:
        assert "first derivatives only" in str(error)
        return
    wide = numerics.converted(inputs, numerics.doubled)
    gradients = tuple(gradient.double() for gradient in gradients)
    expected = _penalty(registry.entries()[entry].reference, wide, gradients)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max())
        )


def a_second_derivative_of_the_summed_loss_is_refused(implementation: str) -> None:
    """Its gradients are made in forward, out of autograd's sight."""
    hidden, weight = torch.randn(3, 4).requires_grad_(), torch.randn(8, 4)
    out = summed_linear_cross_entropy(
        hidden, weight, torch.tensor([0, 7, 3]), implementation=implementation
    )
    try:
        torch.autograd.grad(out.total, hidden, create_graph=True)
    except KernelError as error:
        assert "first derivatives only" in str(error)
    else:
        raise AssertionError("a gradient without a derivative was differentiated")


LAYOUT, TABLES = QKVLayout(2, 2, 16), rope_tables(4, 16, 1e4)


def _projection(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, LAYOUT.width, generator=torch.Generator().manual_seed(tokens))


def expect_saved_tensor_error(loss: torch.Tensor) -> None:
    """Backward must notice that a tensor was overwritten after it had been saved."""
    try:
        loss.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        raise AssertionError("backward did not notice that a saved tensor was overwritten")


def overwriting_is_noticed(implementation: str) -> None:
    """Whoever saved what RoPE or cross-entropy overwrites is told, and so is a recomputation."""
    named = {"implementation": implementation}
    qkv = _projection(4).requires_grad_() * 1
    square = qkv * qkv
    rope_qkv(qkv, LAYOUT, *TABLES, **named)
    expect_saved_tensor_error(square)

    def rotated(qkv: torch.Tensor) -> torch.Tensor:
        q, k, _ = rope_qkv(qkv, LAYOUT, *TABLES, **named)
        return q.square().sum() + (k * k).sum()

    leaf = _projection(4).requires_grad_()
    checkpoint = torch.utils.checkpoint.checkpoint
    expect_saved_tensor_error(checkpoint(rotated, leaf * 1, use_reentrant=False))
    # Recomputing the projection as well is what a checkpoint is for, and right.
    recomputed = checkpoint(lambda leaf: rotated(leaf * 1), leaf, use_reentrant=False)
    (found,) = torch.autograd.grad(recomputed, leaf)
    (expected,) = torch.autograd.grad(rotated(leaf * 1), leaf)
    assert torch.equal(found, expected)


def positions_outside_the_tables_give_nan(implementation: str) -> None:
    """No angle is read outside of a table; the other tokens do not change."""
    # The tables lie between finite numbers, so that a foreign angle would pass for one.
    cos, sin = (torch.cat((table, table, table))[4:8] for table in TABLES)
    wheres = (
        ({"position_ids": torch.tensor([0, 4, 3, -1, 1 << 40, 2])}, [1, 3, 4]),
        ({"cu_seqlens": torch.tensor([0, 1], dtype=torch.int32)}, [4, 5]),
        ({"cu_seqlens": torch.tensor([2, 4, 6], dtype=torch.int32)}, [0, 1]),
        ({"cu_seqlens": torch.tensor([0, 5, 6], dtype=torch.int32)}, [4]),
    )
    for where, foreign in wheres:
        leaf = _projection(6).requires_grad_()
        out = rope_qkv(leaf * 1, LAYOUT, cos, sin, **where, implementation=implementation)
        sum(part.sum() for part in out).backward()
        expected = reference.rope_qkv(leaf.detach(), LAYOUT, cos, sin, **where)
        is_foreign = torch.zeros(6, dtype=torch.bool)
        is_foreign[foreign] = True
        for part, wanted in zip(out, expected, strict=True):
            torch.testing.assert_close(part, wanted, equal_nan=True)
        dq, dk, dv = LAYOUT.split(leaf.grad)
        for part in (*out[:2], dq, dk):
            assert torch.equal(part.isnan().flatten(1).all(1), is_foreign)
            assert torch.equal(part.isnan().flatten(1).any(1), is_foreign)
        assert not out[2].isnan().any() and (dv == 1).all()


def callers_that_own_their_autograd_may_pass_any_strides(implementation: str) -> None:
    """Statistics of a forward pass, and a weight of one number."""
    named = {"implementation": implementation}
    generator = torch.Generator().manual_seed(3)
    x, dy, dtotal = (torch.randn(5, 24, generator=generator) for _ in range(3))
    weight = torch.tensor([1.5]).expand(24)
    y = rms_norm(x, weight, 1e-5, **named)
    torch.testing.assert_close(y, rms_norm(x, weight.contiguous(), 1e-5, implementation="torch"))
    rstd = rms_norm_fp8(x, weight, 1e-5, torch.ones(()), **named).rstd
    dense = rms_norm_backward(dy, x, weight, rstd, dtotal=dtotal, **named)
    apart = rms_norm_backward(dy, x, weight, _apart(rstd), dtotal=dtotal, **named)
    assert all(map(torch.equal, dense, apart))

    q, dout = (torch.randn(10, 1, 64, generator=generator) for _ in range(2))
    table = torch.tensor([[0, 4], [4, 10]], dtype=torch.int32)
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    results = []
    for starts, ends in (table.t().contiguous(), (table[:, 0], table[:, 1])):
        ranges = Ranges(offsets, starts, ends, 6, 6)
        out, lse = attention_forward(q, q, q, ranges, **named)
        gradients = attention_backward(
            dout, q, q, q, out, lse.t().contiguous().t(), ranges, **named
        )
        results.append((attention(q, q, q, ranges, **named).out, lse, *gradients))
    assert all(map(torch.equal, *results))
