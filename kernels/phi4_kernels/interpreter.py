"""Fixes to Triton's CPU interpreter, so that kernels can be checked on a machine without a GPU.

Triton 3.6 to 3.8 interpret bf16 wrongly: stores truncate instead of rounding, `tl.dot` multiplies
the bit patterns, and casts to fp8 differ from torch's. Arithmetic on bf16 values stays wrong: a
kernel must upcast right after each load. The interpreter runs programs one after another, so it
cannot show races; `program_order` runs them in other orders.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import torch

ORDERS = ("forward", "reversed", "shuffled")


def _bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    # bf16 is the upper half of fp32.
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Round to nearest even: add half of the last place that stays, less one bit where that is even.
    to_even = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    # A NaN whose payload is in the lower half would become an infinity.
    rounded = ((bits + to_even) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _convert_like_torch(interpreter: ModuleType) -> None:
    import triton.language as tl

    builtin = interpreter._convert_float
    fp8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return _bf16_to_fp32(values)
        # Conversions that are already correct, and truncation where a kernel requests it.
        if source != tl.float32 or str(rounding).endswith("RTZ"):
            return builtin(values, source, target, rounding)
        if target == tl.bfloat16:
            return _fp32_to_bf16(values)
        if target in fp8:
            # torch's cast is the definition that kernels are compared with.
            exact = torch.from_numpy(np.ascontiguousarray(values))
            return exact.to(fp8[target]).view(torch.uint8).numpy()
        return builtin(values, source, target, rounding)

    interpreter._convert_float = convert  # type: ignore[attr-defined]  # Triton's


def _dot_in_fp32(interpreter: ModuleType) -> None:
    import triton.language as tl

    builtin = interpreter.InterpreterBuilder.create_dot

    def upcast(handle: Any) -> Any:
        # The product of two bf16 numbers is exact in fp32, as in a tensor core.
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_bf16_to_fp32(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        return builtin(self, upcast(a), upcast(b), acc, precision, imprecise)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _keep_cpu_storages(interpreter: ModuleType) -> None:
    """CPU tensors are interpreted in place, so the copy back would copy a storage onto itself."""
    builtin = interpreter.GridExecutor._restore_args_dev

    def restore(self: Any, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        tensors = [arg for arg in (*args_dev, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            builtin(self, args_dev, args_hst, kwargs, kwargs_hst)

    interpreter.GridExecutor._restore_args_dev = restore


@cache
def repair() -> None:
    """Patch the interpreter of this process, once."""
    from triton.runtime import interpreter

    _convert_like_torch(interpreter)
    _dot_in_fp32(interpreter)
    _keep_cpu_storages(interpreter)


@contextmanager
def program_order(order: str) -> Iterator[None]:
    """Run the programs of each interpreted launch in `order`, one of ORDERS."""
    from triton.runtime.interpreter import InterpreterBuilder

    builtin = InterpreterBuilder.set_grid_idx
    permutations: dict[tuple[int, ...], dict[tuple[int, ...], tuple[int, ...]]] = {}

    def set_grid_idx(self: Any, *index: int) -> None:
        grid = tuple(self.grid_dim)
        if grid not in permutations:
            inorder = list(product(*map(range, grid)))
            # The n-th program to run gets the program id of another one.
            permuted = inorder[::-1]
            if order == "shuffled":
                random.Random(len(inorder)).shuffle(permuted)
            permutations[grid] = dict(zip(inorder, permuted, strict=True))
        builtin(self, *permutations[grid][index])

    if order != "forward":
        InterpreterBuilder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = builtin
