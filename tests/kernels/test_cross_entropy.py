"""Cross-entropy beyond the gates: ranks, the collective, the gradient's place, mutants."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from phi4_kernels import registry
from phi4_kernels.cross_entropy import LossOptions, cross_entropy, reference
from phi4_kernels.errors import DeviceError, DtypeError, GateError, KernelError, ShapeError
from phi4_kernels.testing.interpreted import InterpretedProcess

from tests.kernels import cross_entropy_checks as checks
from tests.support.ranks import gloo_group, run_ranks

CHECKS = "tests.kernels.cross_entropy_checks"
GATE = "phi4_kernels.testing.gates:check_numbers"
X, Y = torch.randn(3, 8), torch.tensor([0, 7, 3])


def test_the_definition_is_pytorchs() -> None:
    logits = torch.randn(50, 33, dtype=torch.float64)
    targets = torch.randint(33, (50,))
    targets[::4] = 5
    losses, log_probs = reference.cross_entropy(logits, targets, LossOptions(5, 0.2))
    options = {"ignore_index": 5, "reduction": "none"}
    smoothed = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2, **options)
    torch.testing.assert_close(losses, smoothed)
    plain = torch.nn.functional.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(-log_probs, plain)
    z_loss, _ = reference.cross_entropy(logits, targets, LossOptions(z_loss=2.0))
    expected = plain + 2 * logits.logsumexp(-1).square()
    torch.testing.assert_close(z_loss[targets != 5], expected[targets != 5])


@pytest.mark.parametrize("size", [2, 4])
def test_split_vocabularies_obey_the_error_rule_and_repeat(size: int) -> None:
    *by_kind, again = zip(*run_ranks(size, checks.on_gloo_rank), strict=True)
    for ranks, kind in zip(by_kind, checks.KINDS, strict=True):
        checks.expect_right(ranks, *kind)
    for first, second in zip(by_kind[-1], again, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in checks.NAMES)


@pytest.mark.parametrize("kind", checks.KINDS)
def test_one_rank_obeys_the_same_rule(kind: tuple[torch.dtype, bool]) -> None:
    checks.expect_right([checks.on_rank(0, 1, *kind)], *kind)


@pytest.mark.slow
def test_interpreted_kernels_on_two_ranks(interpreted: InterpretedProcess, tmp_path: Path) -> None:
    second = InterpretedProcess()
    run = f"{CHECKS}:interpreted_rank"
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(each.call, run, rank=rank, size=2, folder=str(tmp_path))
            for rank, each in enumerate((interpreted, second))
        ]
        for call in calls:
            call.result()
    second.close()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    checks.expect_right(ranks, torch.bfloat16, False)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(
    "check",
    [
        "one_graph",
        "one_launch_has_the_bits_of_two",
        "ignored_rows_are_not_read",
        "a_foreign_target_gives_nan",
        "masked_columns_get_nothing",
    ],
)
def test_both_implementations(
    interpreted: InterpretedProcess, check: str, implementation: str
) -> None:
    interpreted.call(f"{CHECKS}:{check}", implementation=implementation)


@pytest.mark.slow  # inductor compiles C++ for 20 s
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles by g++")
def test_padded_rows_compile(interpreted: InterpretedProcess) -> None:
    interpreted.call(f"{CHECKS}:padded_rows_compile", implementation="triton")


def count_collectives(rank: int, world_size: int) -> None:
    gather, sizes = dist.all_gather_into_tensor, []

    def counted(output: torch.Tensor, mine: torch.Tensor, **others: object) -> None:
        sizes.append(mine.numel() * mine.itemsize)
        gather(output, mine, **others)

    with gloo_group(rank, world_size), mock.patch.object(dist, "all_gather_into_tensor", counted):
        for options, num_bytes in ((LossOptions(z_loss=1e-4), 12), (LossOptions(-1, 0.1), 16)):
            sizes.clear()
            activation = torch.randn(2, 3, 8, requires_grad=True) * 1
            out = cross_entropy(
                activation, torch.zeros(2, 3).long(), options, group=dist.group.WORLD
            )
            assert out.losses.shape == (2, 3)
            out.losses.sum().backward()
            assert sizes == [6 * num_bytes]
        sizes.clear()
        cross_entropy(torch.randn(0, 8), torch.zeros(0).long(), group=dist.group.WORLD)
        assert not sizes
        os.environ["PHI4_KERNELS_DEBUG"] = "1"
        with pytest.raises(KernelError, match=r"\[4, 5\] columns"):
            cross_entropy(torch.randn(3, 4 + rank), Y.clamp(max=3), group=dist.group.WORLD)


def test_one_collective_of_twelve_or_sixteen_bytes_per_token_and_equal_shards() -> None:
    run_ranks(2, count_collectives)


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    leaf = X.clone().requires_grad_()
    activation = leaf * 1
    out = cross_entropy(activation, Y)
    (gradient,) = torch.autograd.grad(out.losses.sum(), activation, retain_graph=True)
    assert gradient.data_ptr() == activation.data_ptr()
    with pytest.raises(KernelError, match="backward ran before"):
        out.losses.sum().backward()


def test_whoever_saved_the_logits_is_told() -> None:
    activation = X.clone().requires_grad_() * 1
    square = activation * activation
    cross_entropy(activation, Y).losses.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_log_probs_alone_leave_the_logits_and_save_nothing() -> None:
    activation, saved = X.clone().requires_grad_() * 1, []
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor)
    with torch.no_grad(), hooks:
        log_probs = cross_entropy(activation, Y).log_probs
    assert torch.equal(activation, X) and not saved
    torch.testing.assert_close(log_probs, X.log_softmax(-1)[range(3), Y])


@pytest.mark.parametrize("unused", ["losses", "log_probs"])
def test_an_output_that_is_not_used_adds_nothing(unused: str) -> None:
    leaf = X.clone().requires_grad_()
    out = cross_entropy(leaf * 1, Y)._asdict()
    out.pop(unused)
    next(iter(out.values())).sum().backward()
    sign = 1 if unused == "log_probs" else -1
    expected = X.softmax(-1) - torch.nn.functional.one_hot(Y, 8)
    torch.testing.assert_close(leaf.grad, sign * expected)


BAD = {
    "logits in fp64": (lambda: cross_entropy(X.double(), Y), DtypeError, "float64"),
    "a single row": (lambda: cross_entropy(X[0], Y[0]), ShapeError, r"\(8,\)"),
    "no columns": (lambda: cross_entropy(X[:, :0], Y), ShapeError, r"\(3, 0\)"),
    "columns apart": (lambda: cross_entropy(X.t(), Y.new_zeros(8)), ShapeError, "contiguous"),
    "rows at two distances": (
        lambda: cross_entropy(torch.randn(2, 4, 8)[:, :3], Y.expand(2, 3)),
        ShapeError,
        "one distance",
    ),
    "rows that are one": (
        lambda: cross_entropy(X[:1].expand(3, 8), Y),
        ShapeError,
        "do not overlap",
    ),
    "rows that overlap": (
        lambda: cross_entropy(X.as_strided((3, 8), (4, 1)), Y),
        ShapeError,
        "do not overlap",
    ),
    "a leaf": (lambda: cross_entropy(X.clone().requires_grad_(), Y), KernelError, "leaf"),
    "targets as floats": (lambda: cross_entropy(X, Y.float()), DtypeError, "float32"),
    "a target too few": (lambda: cross_entropy(X, Y[:2]), ShapeError, r"\(2,\)"),
    "weights in bf16": (
        lambda: cross_entropy(X, Y, weights=torch.ones(3).bfloat16()),
        DtypeError,
        "bfloat16",
    ),
    "weights of another shape": (
        lambda: cross_entropy(X, Y, weights=torch.ones(1)),
        ShapeError,
        r"\(1,\)",
    ),
    "weights with a gradient": (
        lambda: cross_entropy(X, Y, weights=torch.ones(3, requires_grad=True)),
        KernelError,
        "detach",
    ),
    "targets elsewhere": (lambda: cross_entropy(X, Y.to("meta")), DeviceError, "meta"),
    "too much smoothing": (lambda: LossOptions(label_smoothing=1.0), KernelError, "1.0"),
    "negative z-loss": (lambda: LossOptions(z_loss=-1e-4), KernelError, "-0.0001"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_typed_error(case: str) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text) as raised:
        call()
    assert "\n" not in str(raised.value) and str(raised.value).count(";") >= 1


def test_ids_are_checked_under_the_debug_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4_KERNELS_DEBUG", "1")
    cross_entropy(X, torch.tensor([0, 7, -100]))
    with pytest.raises(KernelError, match="span -1 to 8; expected 0 to 7 or -100"):
        cross_entropy(X, torch.tensor([0, 8, -1]))


MUTANTS = {
    "sum not rescaled": (
        "l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(x - m_new[:, None]), axis=1)",
        "l_i + tl.sum(tl.exp(x - m_new[:, None]), axis=1)",
        ("cross_entropy", "v2500-z-loss", "fp32"),
    ),
    "a rank left out": (
        "for rank in tl.static_range(RANKS):\n        rank_ptr",
        "for rank in tl.static_range(RANKS - 1):\n        rank_ptr",
        ("cross_entropy_sharded", "p2-v2006", "bf16"),
    ),
    "ranks not rescaled": (
        "share * tl.exp(local - row_max.to(tl.float64))",
        "share",
        ("cross_entropy_sharded", "p4-v4012-all-terms", "bf16"),
    ),
    "an off-rank target picked": (
        "owned = (column >= 0) & (column < WIDTH)",
        "owned = column < WIDTH",
        ("cross_entropy_sharded", "p2-v2006", "bf16"),
    ),
    "the target's gradient on every rank": (
        "column = target - first\n        full",
        "column = target % WIDTH\n        full",
        ("cross_entropy_sharded", "p2-v2006", "bf16"),
    ),
    "ignored tokens get a gradient": (
        "if target == ignore_index:\n        _zero(row_ptr, WIDTH, BLOCK)",
        "if target == ignore_index:\n        pass",
        ("cross_entropy", "v5", "bf16"),
    ),
    "z-loss without its slope": (
        "slope = 1.0 + 2.0 * Z_LOSS * lse",
        "slope = 1.0 + Z_LOSS * lse",
        ("cross_entropy", "v2500-z-loss", "fp32"),
    ),
    "smoothing over the shard": (
        "even = dloss * SMOOTHING / vocabulary",
        "even = dloss * SMOOTHING / WIDTH",
        ("cross_entropy_sharded", "p4-v4012-all-terms", "fp32"),
    ),
    "tail dropped": (
        "if full < WIDTH:\n            _gradient",
        "if False:\n            _gradient",
        ("cross_entropy", "v1003-strided", "bf16"),
    ),
    "gradient past the end": (
        "tl.store(row_ptr + cols, dx, mask=cols < WIDTH)",
        "tl.store(row_ptr + cols, dx, mask=cols < WIDTH + 1)",
        ("cross_entropy", "v5", "bf16"),
    ),
    "probabilities in half precision": (
        "dx = tl.exp(x - row_max) * scale - even",
        "dx = (tl.exp(x - row_max) * scale - even).to(tl.bfloat16).to(tl.float32)",
        ("cross_entropy", "v5", "fp32"),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_turns_the_gate_red(mutated: InterpretedProcess, mutant: str) -> None:
    old, new, (entry, case, dtype) = MUTANTS[mutant]
    folder = registry.folder("cross_entropy")
    (file,) = (file.name for file in folder.glob("triton_*.py") if old in file.read_text())
    with pytest.raises(GateError, match="GateError"):
        change = ("cross_entropy", file, old, new)
        mutated.call(GATE, mutant=change, entry=entry, case=case, dtype=dtype)
