"""Checks that run inside the interpreting process; see the tests that call them."""

from collections.abc import Callable

import torch
from phi4_kernels import dispatch
from phi4_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_fp8
from phi4_kernels.rope import QKVLayout, rope_qkv, rope_tables
from phi4_kernels.swiglu import swiglu, swiglu_backward, swiglu_fp8, swiglu_linear
from phi4_kernels.testing import random_inputs

FP8 = torch.float8_e4m3fn


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def fp8_norm_equals_torch_casts(rows: int, hidden: int, columnwise: bool) -> None:
    """In fp32 both outputs come from one value, so torch's cast of ours must give our bits."""
    generator = torch.Generator().manual_seed(rows)
    x = random_inputs.rows((rows, hidden), torch.float32, generator)
    residual = random_inputs.rows((rows, hidden), torch.float32, generator)
    weight, scale = torch.randn(hidden, generator=generator), torch.tensor(200.0)
    y, total = add_rms_norm(x, residual, weight, 1e-5, implementation="triton")
    out = rms_norm_fp8(
        x,
        weight,
        1e-5,
        scale,
        residual=residual,
        columnwise=columnwise,
        implementation="triton",
    )
    assert _same(out.total, total)
    assert (y.abs() * scale > 448).any()
    if not columnwise:
        assert _same(out.rowwise, (y * scale).clamp(-448, 448).to(FP8))
        assert out.amax == y.abs().max()
    else:
        assert _same(out.columnwise, out.rowwise.t())
        assert torch.allclose(out.amax, y.abs().max(), rtol=3e-7, atol=0)


def fp8_swiglu_equals_torch_casts(rows: int, width: int, columnwise: bool) -> None:
    """As for the norm; an element's value does not depend on the tile, so columnwise too."""
    gate_up = random_inputs.rows(
        (rows, 2 * width), torch.float32, torch.Generator().manual_seed(rows)
    )
    product = swiglu(gate_up, implementation="triton")
    scale = random_inputs.saturating_scale(product)
    out = swiglu_fp8(gate_up, scale, columnwise=columnwise, implementation="triton")
    assert _same(out.rowwise, (product * scale).clamp(-448, 448).to(FP8))
    assert out.amax == product.abs().max()
    assert out.columnwise is None or _same(out.columnwise, out.rowwise.t())


def backward_functions_equal_autograd(hidden: int) -> None:
    """Callers that own their autograd get the gradient that autograd gets."""
    generator = torch.Generator().manual_seed(hidden)
    x = random_inputs.rows((6, hidden), torch.bfloat16, generator).requires_grad_()
    dy = random_inputs.rows((6, hidden), torch.bfloat16, generator)
    weight = torch.randn(hidden, generator=generator).requires_grad_()
    rms_norm(x, weight, 1e-5, implementation="triton").backward(dy)
    scale = torch.ones(())
    rstd = rms_norm_fp8(x.detach(), weight.detach(), 1e-5, scale, implementation="triton").rstd
    dx, dweight = rms_norm_backward(dy, x.detach(), weight.detach(), rstd, implementation="triton")
    assert _same(dx, x.grad) and _same(dweight, weight.grad)
    gate_up = random_inputs.rows((6, 2 * hidden), torch.bfloat16, generator).requires_grad_()
    out = swiglu(gate_up, implementation="triton")
    out.backward(dy)
    gradient, product = swiglu_backward(
        dy, gate_up.detach(), emit_product=True, implementation="triton"
    )
    assert _same(gradient, gate_up.grad) and _same(product, out.detach())


def rows_far_apart_are_addressed_in_64_bits() -> None:
    """Row 2 of each input starts at element 2^31 or later; the pages between are never touched."""
    stride = 2**30 + 64
    far = torch.empty(2 * stride + 256, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def spread(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        near = torch.randn(3, width, generator=generator).bfloat16()
        view = far.as_strided((3, width), (stride, 1))
        return near, view.copy_(near)

    weight = torch.ones(64)
    near, view = spread(64)
    named = {"implementation": "triton"}
    assert _same(rms_norm(view, weight, 1e-5, **named), rms_norm(near, weight, 1e-5, **named))
    near, view = spread(128)
    assert _same(swiglu(view, **named), swiglu(near, **named))
    layout = QKVLayout(1, 2, 64)
    near, view = spread(layout.width)
    tables = rope_tables(3, 64, 1e4)
    expected = rope_qkv(near, layout, *tables, **named)
    for got, wanted in zip(rope_qkv(view, layout, *tables, **named), expected, strict=True):
        assert _same(got, wanted)


def one_graph_holds_all_ops(implementation: str) -> None:
    """torch.compile traces through the public functions without a break, with equal bits."""
    layout, tables = QKVLayout(2, 2, 16), rope_tables(4, 16, 1e4)
    named = {"implementation": implementation}

    def block(x: torch.Tensor, weight: torch.Tensor, project: torch.Tensor) -> torch.Tensor:
        y, total = add_rms_norm(x, x.sin(), weight, 1e-5, **named)
        q, k, v = rope_qkv(y @ project, layout, *tables, **named)
        return swiglu(total, **named).sum() + (q.sum(2) * k * v).sum()

    def gradients(run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((4, 32), (32,), (32, layout.width))
        leaves = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
        loss = run(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    whole = torch.compile(block, backend="aot_eager", fullgraph=True)
    for first, second in zip(gradients(block), gradients(whole), strict=True):
        torch.testing.assert_close(first, second)


def calls_are_counted() -> dict[str, int]:
    """One step through all three ops, as the counter saw it."""
    x = torch.randn(4, 64, requires_grad=True)
    with dispatch.count_calls() as calls:
        y = rms_norm(x, torch.ones(64), 1e-5, implementation="triton")
        q, k, v = rope_qkv(
            y * 1, QKVLayout(1, 2, 16), *rope_tables(4, 16, 1e4), implementation="triton"
        )
        z, _ = add_rms_norm(v[:, 0], v[:, 0], torch.ones(16), 1e-5, implementation="triton")
        (swiglu(z, implementation="torch").sum() + q.sum() + k.sum()).backward()
        swiglu_linear(z.detach(), torch.ones(3, 8), implementation="triton")
    return {"/".join(key): count for key, count in calls.items()}


def reasons() -> dict[str, str]:
    """What dispatch says in an interpreting process."""
    cpu = torch.device("cpu")
    return {name: dispatch.choose("rope", name, cpu).reason for name in ("auto", "torch", "triton")}
