"""The host forms of csrc, called through its flat C interface from any build."""

import ctypes as c
import subprocess
from pathlib import Path

import torch
from phi4_kernels.launch import ceil_div
from torch import Tensor

TENSOR, LINE, TILE = range(3)


class _Shard(c.Structure):
    _fields_ = (
        *((name, c.c_void_p) for name in ("param", "exp_avg", "exp_avg_sq", "grad", "weight")),
        *((name, c.c_void_p) for name in ("fp8", "fp8_scale", "fp8_amax")),
        ("n", c.c_int64),
    )


class _Step(c.Structure):
    _fields_ = (
        ("grad_type", c.c_int),
        *((name, c.c_void_p) for name in ("grad_scale", "found_inf", "device_lr", "device_step")),
        *((name, c.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        ("step", c.c_int64),
    )


class _Cast(c.Structure):
    _fields_ = (
        ("x", c.c_void_p),
        ("rows", c.c_int64),
        ("columns", c.c_int64),
        *((name, c.c_int) for name in ("x_type", "scaling", "e5m2")),
        *((name, c.c_void_p) for name in ("scale", "rowwise", "columnwise", "inverse")),
        *((name, c.c_void_p) for name in ("inverse_columns", "amax")),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class HostForms:
    """One built library.

    Args:
        path: a shared library with the `_host` functions of phi4_csrc.h, or some of them.
    """

    def __init__(self, path: Path) -> None:
        self._library = c.CDLL(str(path))

    def _run(self, op: str, *arguments: object) -> None:
        assert getattr(self._library, f"phi4_{op}_host")(*arguments) == 0

    def adamw(
        self,
        state: tuple[Tensor, Tensor, Tensor],
        grad: Tensor,
        step: int,
        hyper: dict[str, float],
        grad_scale: Tensor | None = None,
        weight: Tensor | None = None,
        fp8: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Update `state` in place; fp8 is (bytes, scale, amax)."""
        tensors = (*state, grad, weight, *(fp8 or (None, None, None)))
        self.adamw_shards([tensors], step, hyper, grad_scale)

    def adamw_shards(
        self,
        shards: list[tuple[Tensor | None, ...]],
        step: int,
        hyper: dict[str, float],
        grad_scale: Tensor | None = None,
    ) -> None:
        """Update many shards at once, each (param, exp_avg, exp_avg_sq, grad, weight, *fp8)."""
        table = (_Shard * len(shards))(
            *(_Shard(*map(_pointer, tensors), tensors[0].numel()) for tensors in shards)
        )
        call = _Step(shards[0][3].dtype == torch.bfloat16, _pointer(grad_scale))
        call.step = step
        for name, value in hyper.items():
            setattr(call, name, value)
        self._run("adamw", table, c.c_int64(len(shards)), c.byref(call))

    def square_sum(self, tensors: list[Tensor]) -> Tensor:
        """[], fp64."""
        count = len(tensors)
        pointers = (c.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors))
        sizes = (c.c_int64 * count)(*(tensor.numel() for tensor in tensors))
        self._library.phi4_square_sum_partials.restype = c.c_int64
        chunks = self._library.phi4_square_sum_partials(sizes, c.c_int64(count))
        partials = torch.full((chunks,), torch.nan, dtype=torch.float64)
        total = torch.full((), torch.nan, dtype=torch.float64)
        outputs = (c.c_void_p(partials.data_ptr()), c.c_void_p(total.data_ptr()))
        kind = int(tensors[0].dtype == torch.bfloat16)
        self._run("square_sum", pointers, sizes, c.c_int64(count), kind, *outputs)
        return total

    def cast(
        self, x: Tensor, scaling: int, dtype: torch.dtype, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(rowwise, columnwise, inverse, inverse_columns, amax); unwritten bytes stay NaN."""
        rows, columns = x.shape
        down, across = ceil_div(rows, 128), ceil_div(columns, 128)
        inverse = ((0, 0), (rows, across), (down, across))[scaling]
        outputs = (
            torch.full((rows, columns), 0x7F, dtype=torch.uint8).view(dtype),
            torch.full((columns, rows), 0x7F, dtype=torch.uint8).view(dtype),
            torch.full(inverse, torch.nan),
            torch.full((columns, down) if scaling == LINE else (0, 0), torch.nan),
            torch.full((), torch.nan),
        )
        kinds = (x.dtype == torch.bfloat16, scaling, dtype == torch.float8_e5m2)
        pointers = map(_pointer, (scale, *outputs))
        call = _Cast(x.data_ptr(), rows, columns, *kinds, *pointers)
        self._run("fp8_cast", c.byref(call))
        return outputs

    def tile_slot(self, row: int, column: int) -> int:
        """Where a tile keeps an element."""
        return self._library.phi4_fp8_tile_slot(row, column)


def build_host_forms(source: Path, op: str, target: Path) -> HostForms:
    """Compile the host forms of one op, or of all by "*", and nothing else, by nvcc."""
    units = [str(path) for path in sorted(source.glob(f"{op}/*_host.cpp"))]
    flags = ("-std=c++17", "-O1", "-Xcompiler", "-fPIC", "-shared")
    subprocess.run(["nvcc", *flags, *units, "-o", str(target)], check=True)
    return HostForms(target)


class OnHost(HostForms):
    """The kernels and launchers themselves, run by cuda_on_host.h."""

    def _run(self, op: str, *arguments: object) -> None:
        function = getattr(self._library, f"phi4_{op}")
        assert function(*arguments, c.c_void_p(None)) == 0
