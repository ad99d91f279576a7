"""Problems of attention for the emulated Hopper kernels, and the rule that their results obey."""

from typing import NamedTuple

import torch
from phi4_kernels.attention import Ranges, attention_backward, attention_forward, reference
from phi4_kernels.errors import GateError
from phi4_kernels.testing import error_rule
from phi4_kernels.testing.gluon.emulator import emulating
from phi4_kernels.testing.gluon.machine import Schedule
from phi4_kernels.testing.poison import poisoned
from torch import Tensor

LSE_TOLERANCE = 1e-5
"""Of a sum of 128 products of size 1, each addition rounded to 24 bits."""
SCHEDULES = [Schedule(), Schedule("reversed"), Schedule("shuffled", 1), Schedule("shuffled", 2)]


class Problem(NamedTuple):
    """Ranges by lengths: (queries, keys, keys between this range and the next)."""

    ranges: tuple[tuple[int, int, int], ...]
    num_heads: int = 2
    num_key_heads: int = 1
    head_dim: int = 64
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16

    def boundaries(self) -> Ranges:
        queries, starts, ends = [0], [], []
        at = 0
        for num_queries, num_keys, gap in self.ranges:
            queries.append(queries[-1] + num_queries)
            starts.append(at)
            ends.append(at + num_keys)
            at = ends[-1] + gap
        return Ranges.of(queries, starts, ends)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; keys between ranges are NaN, as memory is that nobody has written."""
        generator = torch.Generator().manual_seed(len(self.ranges))
        num_queries = sum(part[0] for part in self.ranges)
        num_keys = sum(part[1] + part[2] for part in self.ranges)
        shapes = [(num_queries, self.num_heads), *[(num_keys, self.num_key_heads)] * 2]
        q, k, v = (torch.randn(*s, self.head_dim, generator=generator) for s in shapes)
        at = 0
        for _, length, gap in self.ranges:
            k[at + length : at + length + gap] = v[at + length : at + length + gap] = torch.nan
            at += length + gap
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)

    def dout(self) -> Tensor:
        """Gradient of the output; 0 where a query sees one key, since the rest is cancellation."""
        shape, generator = self.tensors()[0].shape, torch.Generator().manual_seed(99)
        dout = torch.randn(shape, generator=generator).to(self.dtype)
        counts = [
            num_keys - self.causal * (num_queries - 1 - query)
            for num_queries, num_keys, _ in self.ranges
            for query in range(num_queries)
        ]
        dout[torch.tensor(counts, dtype=torch.int64) == 1] = 0.0
        return dout


def packed(*lengths: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((length, length, 0) for length in lengths)


Results = dict[str, Tensor]


def run(
    problem: Problem,
    schedule: Schedule | None = None,
    num_processors: int = 2,
    sm_margin: int = 0,
) -> Results:
    """Output, lse and all gradients; these from the reference's output, so that only backward's own
    errors are in them."""
    ranges, tensors = problem.boundaries(), problem.tensors()
    given = defined(problem, problem.dtype)
    named = {"causal": problem.causal, "implementation": "gluon", "sm_margin": sm_margin}
    with emulating(schedule, num_processors), poisoned() as guard:
        out, lse = attention_forward(*tensors, ranges, **named)
        gradients = attention_backward(
            problem.dout(), *tensors, given["out"], given["lse"], ranges, **named
        )
    guard.verify()
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def defined(problem: Problem, dtype: torch.dtype) -> Results:
    """What the reference gives for the inputs as `dtype`; keys that nobody has written are zeros,
    which no query sees either."""
    ranges, constants = problem.boundaries(), {"causal": problem.causal}
    constants["scale"] = problem.head_dim**-0.5
    q, k, v = (x.nan_to_num(nan=0.0).to(dtype) for x in problem.tensors())
    out, lse = reference.attention_forward(q, k, v, ranges, **constants)
    dout = problem.dout().to(dtype)
    gradients = reference.attention_backward(dout, q, k, v, out, lse, ranges, **constants)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def check(problem: Problem, ours: Results) -> None:
    """Outputs and gradients by the error rule, lse by what the order of fp32 additions can change.

    The rule compares two samples of such errors; where one query sees one key there is none of lse.
    """
    eager, truth = defined(problem, problem.dtype), defined(problem, torch.float64)
    seen = truth["lse"].isfinite()
    if not torch.equal(ours["lse"].isfinite(), seen) or ours["out"][~seen].any():
        raise GateError("a query without keys got a result, or one with keys got none")
    lse, exact = ours["lse"][seen].double(), truth["lse"][seen]
    if not torch.allclose(lse, exact, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE):
        raise GateError(f"lse is {(lse - exact).abs().max():.3g} off; expected {LSE_TOLERANCE}")
    for name in ("out", "dq", "dk", "dv"):
        error_rule.check(name, ours[name], eager[name], truth[name])


PROBLEMS = {
    "one document": Problem(packed(300)),
    "whole blocks": Problem(packed(256)),
    "one token": Problem(packed(1)),
    "phi-4's heads": Problem(packed(2), num_heads=40, num_key_heads=10, head_dim=128),
    "4 to 2": Problem(packed(65), num_heads=4, num_key_heads=2, head_dim=128),
    "8 to 1, head dim 96": Problem(packed(9, 30), num_heads=8, head_dim=96),
    "1 to 1, fp16": Problem(packed(90, 260), num_heads=2, num_key_heads=2, dtype=torch.float16),
    "not causal": Problem(packed(130, 257), causal=False),
    "tiny documents": Problem(packed(1, 1, 3, 0, 130, 1, 2, 63, 64, 65)),
    "cache": Problem(((1, 200, 57), (3, 129, 0), (2, 128, 127)), num_heads=4, num_key_heads=2),
    "cache, not causal": Problem(((1, 200, 57), (3, 129, 1)), causal=False),
    "more queries than keys": Problem(((200, 70, 3), (5, 0, 0), (140, 139, 0))),
    "no keys": Problem(((3, 0, 0),)),
    "no ranges": Problem(()),
}
