"""Host time of a call of our ops against torch.nn.functional, without a GPU.

What Python does between the public function and the launch is the same on every machine; only the
launch itself is left out here, by a Triton whose kernels start nothing. The other side computes a
few numbers on the CPU, so its time is, if anything, too long. A third one is the least that an op
in Python does: make its outputs and launch one kernel, as a Function where autograd records it.
They take turns.

    python -m tools.host_time --json benchmarks/host_time.jsonl
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from phi4_kernels import dispatch
from phi4_kernels.cross_entropy import cross_entropy
from phi4_kernels.dispatch import Choice
from phi4_kernels.rms_norm import rms_norm
from phi4_kernels.rope import QKVLayout, rope_qkv, rope_tables
from phi4_kernels.swiglu import swiglu
from triton.runtime.jit import JITFunction

from phi4.verify.measured_rows import append_row, provenance

LIMIT = 2.0
"""Of ours over theirs."""
_CALLS = 50

Call = Callable[[], Any]


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Triton's kernels are chosen and called with their arguments, and do nothing."""
    # As the function in its place, it decides once.
    choose = cache(lambda op, *_: Choice(op, "triton", "timed"))
    chosen = mock.patch.object(dispatch, "choose", choose)
    with chosen, mock.patch.object(JITFunction, "run", lambda *_, **__: None):
        yield


def pairs(grad: bool) -> dict[str, tuple[Call, Call]]:
    """By op, a call of ours and the same of torch's on four tokens.

    Args:
        grad: whether autograd records them.
    """
    bf16 = {"dtype": torch.bfloat16}
    x = torch.randn(4, 64, **bf16).requires_grad_(grad)
    weight = torch.ones(64, **bf16).requires_grad_(grad)
    gate_up = torch.randn(4, 128, **bf16).requires_grad_(grad)
    # Activations: cross-entropy and RoPE overwrite what they are given.
    logits = torch.randn(4, 512, **bf16).requires_grad_(grad) * 1
    qkv = torch.randn(4, 6 * 32, **bf16).requires_grad_(grad) * 1
    targets, layout = torch.randint(512, (4,)), QKVLayout(1, 4, 32, "grouped")
    cos, sin = rope_tables(8, 32, 10_000.0, "cpu")

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return heads * cos_all + turned * sin_all

    cos_all, sin_all = (t[:4].repeat(1, 2)[:, None].bfloat16() for t in (cos, sin))

    def eager_rope() -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.view(4, 6, 32).split((4, 1, 1), 1)
        return rotated(q), rotated(k), v

    def eager_swiglu() -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return {
        "rms_norm": (lambda: rms_norm(x, weight, 1e-5), lambda: F.rms_norm(x, (64,), weight, 1e-5)),
        "swiglu": (lambda: swiglu(gate_up), eager_swiglu),
        "rope_qkv": (lambda: rope_qkv(qkv, layout, cos, sin), eager_rope),
        "cross_entropy": (
            lambda: cross_entropy(logits, targets),
            lambda: F.cross_entropy(logits, targets, reduction="none"),
        ),
    }


OUTPUTS = {"rms_norm": 2, "swiglu": 1, "rope_qkv": 3, "cross_entropy": 3}
"""Tensors that an op's forward makes."""


@triton.jit
def _nothing(x_ptr, first_ptr, SIZE: tl.constexpr):
    pass


class _Least(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, num_outputs: int) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x)
        return _least(x, num_outputs)


def _least(x: torch.Tensor, num_outputs: int) -> tuple[torch.Tensor, ...]:
    outputs = tuple([x.new_empty(4) for _ in range(num_outputs)])
    _nothing[(4,)](x, outputs[0], SIZE=64, num_warps=4)
    return outputs


def least(op: str, grad: bool) -> Call:
    """Return the third side of an op's pair."""
    x = torch.randn(4, 64, dtype=torch.bfloat16).requires_grad_(grad) * 1
    run = _Least.apply if grad else _least
    return lambda: run(x, OUTPUTS[op])


def microseconds(sides: Sequence[Call], rounds: int) -> np.ndarray:
    """Per call [rounds, sides], the sides in turn."""
    times = np.empty((rounds, len(sides)))
    order = list(enumerate(sides))
    for index in range(rounds):
        for side, call in order if index % 2 else order[::-1]:
            begun = time.perf_counter()
            for _ in range(_CALLS):
                call()
            times[index, side] = (time.perf_counter() - begun) / _CALLS * 1e6
    return times


def measure(rounds: int) -> dict[str, Any]:
    """Return the row."""
    torch.set_num_threads(1)
    found = {}
    with launching_nothing():
        for grad in (False, True):
            for op, pair in pairs(grad).items():
                sides = (*pair, least(op, grad))
                microseconds(sides, 3)
                times = microseconds(sides, rounds)
                # The fastest rounds: what else the machine does only ever adds.
                us, other_us, least_us = np.percentile(times, 10, axis=0)
                found[f"{op}{' with autograd' if grad else ''}"] = {
                    "us": round(float(us), 1),
                    "torch_us": round(float(other_us), 1),
                    "least_us": round(float(least_us), 1),
                    "ratio": round(float(us / other_us), 2),
                }
    over = sorted(name for name, row in found.items() if row["ratio"] > LIMIT)
    return {"benchmark": "host_time", "calls": found, "limit": LIMIT, "over": over}


def main() -> None:
    """Command line; exit code 1 when a call is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    options = parser.parse_args()
    row = measure(options.rounds)
    print(json.dumps(row | provenance()))
    if options.json:
        append_row(options.json, row)
    raise SystemExit(bool(row["over"]))


if __name__ == "__main__":
    main()
