"""Wrong input is a typed error that names what was got, what is expected and what to change."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from phi4_kernels import errors, registry
from phi4_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_fp8
from phi4_kernels.rope import QKVLayout, rope_qkv, rope_tables
from phi4_kernels.swiglu import swiglu, swiglu_backward, swiglu_linear

X, W = torch.randn(3, 8), torch.ones(8)
LAYOUT = QKVLayout(num_groups=2, queries_per_group=2, head_dim=8)
QKV, COS, SIN = torch.randn(4, LAYOUT.width), *rope_tables(4, 8, 1e4)

BAD = {
    "integer activations": (lambda: rms_norm(X.int(), W, 1e-5), errors.DtypeError, "int32"),
    "weight of another dtype": (lambda: rms_norm(X, W.half(), 1e-5), errors.DtypeError, "float16"),
    "weight of another width": (lambda: rms_norm(X, W[:4], 1e-5), errors.ShapeError, r"\(4,\)"),
    "scalar activation": (
        lambda: rms_norm(torch.tensor(1.0), W, 1e-5),
        errors.ShapeError,
        "scalar",
    ),
    "residual of another shape": (
        lambda: add_rms_norm(X, X[:2], W, 1e-5),
        errors.ShapeError,
        r"\(2, 8\)",
    ),
    "residual of another dtype": (
        lambda: add_rms_norm(X, X.bfloat16(), W, 1e-5),
        errors.DtypeError,
        "bfloat16",
    ),
    "weight on another device": (
        lambda: rms_norm(X, W.to("meta"), 1e-5),
        errors.DeviceError,
        "meta",
    ),
    "a vector of scales": (
        lambda: rms_norm_fp8(X, W, 1e-5, torch.ones(3)),
        errors.ShapeError,
        r"\(3,\)",
    ),
    "statistics of other rows": (
        lambda: rms_norm_backward(X, X, W, torch.ones(2)),
        errors.ShapeError,
        r"rstd has shape \(2,\); expected \(3,\)",
    ),
    "statistics in fp64": (
        lambda: rms_norm_backward(X, X, W, torch.ones(3).double()),
        errors.DtypeError,
        "rstd is torch.float64",
    ),
    "residual gradient of other rows": (
        lambda: rms_norm_backward(X, X, W, torch.ones(3), dtotal=X[:2]),
        errors.ShapeError,
        r"dtotal has shape \(2, 8\)",
    ),
    "residual gradient of another dtype": (
        lambda: rms_norm_backward(X, X, W, torch.ones(3), dtotal=X.half()),
        errors.DtypeError,
        "dtotal is torch.float16",
    ),
    "odd gate_up": (lambda: swiglu(torch.randn(3, 7)), errors.ShapeError, r"\(3, 7\)"),
    "gate_up in fp64": (lambda: swiglu(X.double()), errors.DtypeError, "float64"),
    "dout of another width": (
        lambda: swiglu_backward(torch.randn(3, 3), X),
        errors.ShapeError,
        r"\(3, 3\)",
    ),
    "down projection of another width": (
        lambda: swiglu_linear(X, torch.randn(5, 8)),
        errors.ShapeError,
        r"\(5, 8\)",
    ),
    "odd head_dim": (lambda: QKVLayout(2, 2, 7), errors.ShapeError, "even"),
    "unknown order": (lambda: QKVLayout(2, 2, 8, "sorted"), errors.ShapeError, "sorted"),
    "odd rotary_dim": (lambda: rope_tables(4, 5, 1e4), errors.ShapeError, "5"),
    "layout that does not add up": (
        lambda: rope_qkv(QKV[:, :-8], LAYOUT, COS, SIN),
        errors.ShapeError,
        "64",
    ),
    "tables in bf16": (
        lambda: rope_qkv(QKV, LAYOUT, COS.bfloat16(), SIN),
        errors.DtypeError,
        "bfloat16",
    ),
    "tables wider than a head": (
        lambda: rope_qkv(QKV, LAYOUT, *rope_tables(4, 16, 1e4)),
        errors.ShapeError,
        "rotary_dim <= 8",
    ),
    "columns apart": (
        lambda: rope_qkv(torch.randn(LAYOUT.width, 4).t(), LAYOUT, COS, SIN),
        errors.ShapeError,
        "contiguous row",
    ),
    "tokens that are one": (
        lambda: rope_qkv(QKV[:1].expand(4, -1), LAYOUT, COS, SIN),
        errors.ShapeError,
        "do not overlap",
    ),
    "tokens that overlap": (
        lambda: rope_qkv(QKV.as_strided((3, LAYOUT.width), (8, 1)), LAYOUT, COS, SIN),
        errors.ShapeError,
        "do not overlap",
    ),
    "tables without positions": (
        lambda: rope_qkv(QKV, LAYOUT, COS[:0], SIN[:0]),
        errors.ShapeError,
        r"\(0, 4\)",
    ),
    "a leaf to overwrite": (
        lambda: rope_qkv(QKV.clone().requires_grad_(), LAYOUT, COS, SIN),
        errors.KernelError,
        "overwritten",
    ),
    "more tokens than positions": (
        lambda: rope_qkv(QKV, LAYOUT, COS[:3], SIN[:3]),
        errors.PositionError,
        "4 tokens",
    ),
    "two kinds of positions": (
        lambda: rope_qkv(
            QKV,
            LAYOUT,
            COS,
            SIN,
            position_ids=torch.arange(4),
            cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
        ),
        errors.PositionError,
        "drop one",
    ),
    "positions as floats": (
        lambda: rope_qkv(QKV, LAYOUT, COS, SIN, position_ids=torch.zeros(4)),
        errors.DtypeError,
        "float32",
    ),
    "boundaries in int64": (
        lambda: rope_qkv(QKV, LAYOUT, COS, SIN, cu_seqlens=torch.tensor([0, 4])),
        errors.DtypeError,
        "cu_seqlens is torch.int64",
    ),
    "unknown implementation": (
        lambda: swiglu(X, implementation="metal"),
        errors.ImplementationError,
        "torch, triton",
    ),
    "triton without a GPU": (
        lambda: swiglu(X, implementation="triton"),
        errors.DeviceError,
        "TRITON_INTERPRET=1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_typed_error(case: str) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text) as raised:
        call()
    assert isinstance(raised.value, errors.KernelError)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        ({"position_ids": torch.tensor([0, 1, 2, 4])}, "span 0 to 4"),
        ({"position_ids": torch.tensor([-1, 1, 2, 3])}, "span -1 to 3"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "from 0 to 3"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4], dtype=torch.int32)}, "lengths -1"),
    ],
)
def test_positions_are_checked_under_the_debug_switch(
    monkeypatch: pytest.MonkeyPatch, positions: dict[str, torch.Tensor], text: str
) -> None:
    monkeypatch.setenv("PHI4_KERNELS_DEBUG", "1")
    with pytest.raises(errors.PositionError, match=text):
        rope_qkv(QKV.clone(), LAYOUT, COS, SIN, **positions)


def test_a_width_over_the_ladder_is_an_error() -> None:
    from phi4_kernels import launch

    ladder = (launch.Launch(8, 8, 1), launch.Launch(16, 8, 2))
    assert launch.pick(ladder, 9) is ladder[1]
    with pytest.raises(errors.ImplementationError, match="17"):
        launch.pick(ladder, 17)


@pytest.mark.parametrize(
    ("width", "block"), [(17920, 512), (1792, 256), (8960, 256), (100, 128), (1030, 512), (3, 4)]
)
def test_blocks_divide_the_width_where_they_can(width: int, block: int) -> None:
    from phi4_kernels.launch import divisor_block

    assert divisor_block(width, 512, 128) == block


def test_every_message_has_a_remedy() -> None:
    """Three clauses: got; expected; remedy."""
    calls: list[Callable] = [call for call, _, _ in BAD.values()]
    for call in calls:
        with pytest.raises(errors.KernelError) as raised:
            call()
        assert str(raised.value).count(";") >= 1


def _dropped_arguments(root: Path) -> list[str]:
    """`file:line name` of functions that take *args or **kwargs and never read them."""
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            rest = {arg.arg for arg in (node.args.vararg, node.args.kwarg) if arg is not None}
            read = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            if rest - read:
                found.append(f"{path.relative_to(root)}:{node.lineno} {node.name}")
    return found


def test_no_function_drops_arguments_that_it_does_not_know(tmp_path: Path) -> None:
    assert _dropped_arguments(registry.ROOT) == []
    (tmp_path / "a.py").write_text("def f(x, *_, **others):\n    return x\n")
    assert _dropped_arguments(tmp_path) == ["a.py:1 f"]
