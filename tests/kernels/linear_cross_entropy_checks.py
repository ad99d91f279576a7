"""The projection with its cross-entropy on one rank, for the tests that start ranks or count bytes.

Tokens come at scales from 1e-3 to 30 and a fifth of them is ignored; with several ranks almost
every target belongs to another rank.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from phi4_kernels import dispatch
from phi4_kernels.cross_entropy import (
    LinearLayout,
    LossOptions,
    linear_cross_entropy,
    reference,
    summed_linear_cross_entropy,
)
from phi4_kernels.errors import GateError
from phi4_kernels.testing import error_rule, random_inputs
from phi4_kernels.testing.mutants import mutant
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.ranks import gloo_group

OPTIONS = LossOptions(label_smoothing=0.1, z_loss=1e-4)
FORMS = ("per token", "summed", "into main_grad")
NAMES = ("losses", "log_probs", "hidden", "weight")
Results = dict[str, torch.Tensor]
Kind = tuple[torch.dtype, int, bool]
KINDS: tuple[Kind, ...] = (
    (torch.bfloat16, 1204, False),
    (torch.float32, 1204, True),
    (torch.float32, 100352, False),
)
"""Dtype, vocabulary, and whether the logits are peaked."""


def problem(dtype: torch.dtype, vocabulary: int, peaked: bool) -> dict[str, torch.Tensor]:
    """[20, 24] hidden states, a weight, targets, and gradients of the per-token results."""
    tokens, width = 20, 24
    generator = torch.Generator().manual_seed(5)
    hidden = random_inputs.rows((tokens, width), dtype, generator, high=30.0 if peaked else 3.0)
    weight = torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)
    weight = weight.to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    if peaked:
        targets[::2] = (hidden.float() @ weight.float().t()).argmax(-1)[::2]
    targets[::5] = OPTIONS.ignore_index
    names = ("weights", "dlosses", "dlog_probs")
    return {"hidden": hidden, "weight": weight, "targets": targets} | {
        name: torch.rand(tokens, generator=generator) for name in names
    }


def on_rank(
    rank: int, size: int, kind: Kind, form: str, *, sequence: bool = False, chunk: int = 6
) -> Results:
    """Results and gradients by NAMES, hidden's and weight's of this rank's part."""
    given = problem(*kind)
    rows = given["hidden"].chunk(size)[rank] if sequence else given["hidden"]
    hidden = rows.clone().requires_grad_()
    weight = given["weight"].chunk(size)[rank].clone().requires_grad_()
    main_grad = torch.zeros(weight.shape) if form == "into main_grad" else None
    function = linear_cross_entropy if form == "per token" else summed_linear_cross_entropy
    layout = LinearLayout(dist.group.WORLD if size > 1 else None, sequence, chunk)
    more = {"weights": given["weights"], "layout": layout, "main_grad": main_grad}
    out = function(hidden, weight, given["targets"], OPTIONS, **more, implementation="torch")
    if form == "per token":
        torch.autograd.backward(out, (given["dlosses"], given["dlog_probs"]))
    else:
        out.total.backward()
    dweight = weight.grad if main_grad is None else main_grad
    results = (out.losses, out.log_probs, hidden.grad, dweight)
    return dict(zip(NAMES, (tensor.detach() for tensor in results), strict=True))


@cache
def defined(kind: Kind, form: str, wide: bool) -> Results:
    """What they should be: the reference as it is, or in fp64. Not to be written to."""
    given = {
        name: tensor.double() if wide and tensor.is_floating_point() else tensor
        for name, tensor in problem(*kind).items()
    }
    hidden, weight = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
    out = reference.linear_cross_entropy(
        hidden, weight, given["targets"], OPTIONS, weights=given["weights"]
    )
    if form == "per token":
        torch.autograd.backward(out, (given["dlosses"], given["dlog_probs"]))
    else:
        out[0].sum().backward()
    is_wide = form == "into main_grad" and not wide
    dweight = weight.grad.float() if is_wide else weight.grad
    results = (*(tensor.detach() for tensor in out), hidden.grad, dweight)
    return dict(zip(NAMES, results, strict=True))


def expect_right(ranks: list[Results], kind: Kind, form: str, *, sequence: bool = False) -> None:
    """Ranks agree in every bit where they hold the same, and the whole obeys the error rule."""
    shared = NAMES[:2] if sequence else NAMES[:3]
    for other in ranks[1:]:
        assert all(torch.equal(other[name], ranks[0][name]) for name in shared)
    ours = ranks[0] | {"weight": torch.cat([rank["weight"] for rank in ranks])}
    if sequence:
        ours["hidden"] = torch.cat([rank["hidden"] for rank in ranks])
    eager, truth = defined(kind, form, wide=False), defined(kind, form, wide=True)
    for name in NAMES:
        error_rule.check(f"{form} {name}", ours[name], eager[name], truth[name])
    if len(ranks) > 1 and kind[0] != torch.float32:
        one = on_rank(0, 1, kind, form)["hidden"]
        _expect_one_rounding(ours["hidden"], one, truth["hidden"])


def _expect_one_rounding(several: torch.Tensor, one: torch.Tensor, truth: torch.Tensor) -> None:
    """Ranks sum hidden's gradient in fp32 and round once, which no rule of twice eager's can tell.

    Parts that are rounded first leave 1.24 to 1.44 times the error; summed right, it is the same.
    """
    norm = truth.norm(dim=1).clamp(min=1e-30)
    errors = [((x.double() - truth).norm(dim=1) / norm).norm() for x in (several, one)]
    if not errors[0] <= 1.1 * errors[1]:
        raise GateError(
            f"hidden's gradient errs {errors[0] / errors[1]:.2f} times as much as on one rank; "
            "expected 1.1 at most; sum the parts in fp32 and round once"
        )


RANK_CASES = [
    (kind, form, sequence)
    for kind in KINDS
    for form in FORMS
    for sequence in (False, True)
    if kind is KINDS[0] or form != "summed"
]


def on_gloo_rank(rank: int, size: int) -> list[Results]:
    """on_rank for RANK_CASES inside a group of its own, the last case twice."""
    with gloo_group(rank, size):
        cases = [*RANK_CASES, RANK_CASES[-1]]
        return [on_rank(rank, size, *case[:2], sequence=case[2]) for case in cases]


def mutants(rank: int, size: int) -> list[Results]:
    """Ranks that do not add the others' gradient of hidden, and ranks that round their own part."""
    found = []
    with gloo_group(rank, size):
        for kind, old, new in (
            (KINDS[1], "if group is None or", "if True or"),
            (KINDS[0], "share = wide_product(dlogits,", "share = torch.mm(dlogits,"),
        ):
            with mutant("cross_entropy", "chunks.py", old, new):
                found.append(on_rank(rank, size, kind, "summed"))
    return found


def count_collectives(rank: int, size: int) -> dict[str, list[tuple[str, int]]]:
    """(collective, bytes that this rank gives) of every form, in order."""
    found: dict[str, list[tuple[str, int]]] = {}
    with gloo_group(rank, size):
        for sequence in (False, True):
            for form in ("per token", "summed"):
                with counted() as calls:
                    on_rank(rank, size, KINDS[1], form, sequence=sequence, chunk=10)
                found[f"{form}{', sequence' if sequence else ''}"] = calls
    return found


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Collect the collectives made inside."""
    calls: list[tuple[str, int]] = []

    def wrapped(name: str, given: int) -> Any:
        run = getattr(dist, name)

        def call(*tensors: Any, **others: Any) -> Any:
            calls.append((name, tensors[given].numel() * tensors[given].itemsize))
            return run(*tensors, **others)

        return mock.patch.object(dist, name, call)

    gathers = wrapped("all_gather_into_tensor", 1), wrapped("reduce_scatter_tensor", 1)
    with gathers[0], gathers[1], wrapped("all_reduce", 0):
        yield calls


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def fake_peak(form: str, implementation: str) -> float:
    """Peak at 16,384 tokens of phi-4 over hidden, its gradient, the weight's in fp32 and a chunk.

    Every allocation of the op is made, without memory behind it; a kernel stands for itself.
    """
    tokens, width, vocabulary = 16384, 5120, 100352
    resolved = mock.patch.object(dispatch, "resolve", lambda *_: implementation)
    with resolved, FakeTensorMode(), LiveBytes() as bytes_:
        half = {"dtype": torch.bfloat16, "requires_grad": True}
        weight = torch.empty(vocabulary, width, **half)
        targets = torch.empty(tokens, dtype=torch.int64)
        outside = bytes_.live
        hidden = torch.empty(tokens, width, **half)
        main_grad = torch.empty(vocabulary, width) if form == "into main_grad" else None
        function = linear_cross_entropy if form == "per token" else summed_linear_cross_entropy
        out = function(hidden, weight, targets, main_grad=main_grad)
        out[0].sum().backward()
    needed = 2 * tokens * width * 2 + vocabulary * width * 4 + 1024 * vocabulary * 2
    return (bytes_.peak - outside) / needed


def resident_peak(form: str) -> float:
    """As fake_peak with real bytes of a fresh process: 64 tokens, width 1024, chunks of 16."""
    tokens, width, vocabulary, chunk = 64, 1024, 100352, 16
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16).requires_grad_()
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    function = linear_cross_entropy if form == "per token" else summed_linear_cross_entropy

    def run(tokens: int) -> None:
        layout = LinearLayout(chunk_tokens=chunk)
        out = function(hidden[:tokens], weight, targets[:tokens], layout=layout)
        out[0].sum().backward()

    run(1)
    weight.grad = hidden.grad = None
    gc.collect()
    # 5 forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    run(tokens)
    needed = 2 * tokens * width * 2 + vocabulary * width * 4 + chunk * vocabulary * 2
    # Hidden states were there before.
    return (_resident_bytes("VmHWM") - before + hidden.nbytes) / needed


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def one_graph(implementation: str) -> None:
    """torch.compile traces both functions without a break, main_grad included; bits of eager."""

    def per_token(hidden: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        out = linear_cross_entropy(hidden, weight, targets, OPTIONS, **named)
        return out.losses.sum() + out.log_probs.square().sum()

    def summed(hidden: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return summed_linear_cross_entropy(hidden, weight, targets, OPTIONS, **named).total

    def added(hidden: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return summed_linear_cross_entropy(hidden, weight, targets, main_grad=total, **named).total

    targets = torch.tensor([0, 39, -100, 7, 7, 20])
    named = {"implementation": implementation, "layout": LinearLayout(chunk_tokens=4)}
    for function in (per_token, summed, added):
        whole = torch.compile(function, backend="aot_eager", fullgraph=True)
        for first, second in zip(_run(function), _run(whole), strict=True):
            assert torch.equal(first, second)


def _run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(40, 8, generator=generator).bfloat16().requires_grad_()
    total = torch.zeros(40, 8)
    loss = function(hidden, weight, total)
    loss.backward()
    grads = [tensor.grad for tensor in (hidden, weight) if tensor.grad is not None]
    return [loss.detach(), total, *grads]
