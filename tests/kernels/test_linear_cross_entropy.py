"""The projection with its cross-entropy beyond the gates: ranks, memory, contracts, mutants."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from phi4_kernels import registry
from phi4_kernels.bench.providers import function
from phi4_kernels.cross_entropy import (
    LossOptions,
    chunks,
    fp32_products,
    linear_cross_entropy,
    reference,
    summed_linear_cross_entropy,
)
from phi4_kernels.errors import (
    GateError,
    KernelError,
)
from phi4_kernels.testing import numerics
from phi4_kernels.testing.interpreted import InterpretedProcess

from tests.kernels import linear_cross_entropy_checks as checks
from tests.support.ranks import run_ranks

CHECKS = "tests.kernels.linear_cross_entropy_checks"
FUNCTIONS = (linear_cross_entropy, summed_linear_cross_entropy)
X, W, Y = torch.randn(3, 4), torch.randn(8, 4), torch.tensor([0, 7, 3])


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    return X.clone().requires_grad_(), W.clone().requires_grad_()


def test_the_definition_is_pytorchs() -> None:
    hidden, weight = torch.randn(9, 6).double(), torch.randn(33, 6).double()
    targets = torch.randint(33, (9,))
    losses, log_probs = reference.linear_cross_entropy(hidden, weight, targets, LossOptions(5, 0.2))
    options = {"ignore_index": 5, "reduction": "none"}
    plain = F.cross_entropy(F.linear(hidden, weight), targets, **options)
    torch.testing.assert_close(-log_probs, plain)
    smoothed = F.cross_entropy(F.linear(hidden, weight), targets, label_smoothing=0.2, **options)
    torch.testing.assert_close(losses, smoothed)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ranks_give_the_results_of_one_and_repeat(size: int) -> None:
    *by_case, again = zip(*run_ranks(size, checks.on_gloo_rank), strict=True)
    for ranks, (kind, form, sequence) in zip(by_case, checks.RANK_CASES, strict=True):
        checks.expect_right(list(ranks), kind, form, sequence=sequence)
    for first, second in zip(by_case[-1], again, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in checks.NAMES)


def test_a_gradient_that_is_not_summed_over_ranks_or_not_in_fp32_is_found() -> None:
    not_summed, rounded = zip(*run_ranks(2, checks.mutants), strict=True)
    with pytest.raises((GateError, AssertionError)):
        checks.expect_right(list(not_summed), checks.KINDS[1], "summed")
    with pytest.raises(GateError, match="sum the parts in fp32"):
        checks.expect_right(list(rounded), checks.KINDS[0], "summed")


@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize("kind", checks.KINDS)
def test_chunks_of_any_size_obey_the_error_rule_and_repeat(kind: checks.Kind, form: str) -> None:
    for chunk in (1, 7, 20, 1024):
        first, second = (checks.on_rank(0, 1, kind, form, chunk=chunk) for _ in range(2))
        checks.expect_right([first], kind, form)
        assert all(torch.equal(first[name], second[name]) for name in checks.NAMES)


def test_collectives_are_what_the_docstring_says() -> None:
    for calls in run_ranks(2, checks.count_collectives):
        # 20 tokens of width 24 in two chunks of 10; fp32 logits, four statistics with smoothing.
        statistics = ("all_gather_into_tensor", 10 * 16)
        reduced = ("all_reduce", 10 * 24 * 4)
        assert calls["summed"] == [statistics, reduced] * 2
        assert calls["per token"] == [statistics] * 2 + [reduced] * 2
        gathered = ("all_gather_into_tensor", 5 * 24 * 4)
        scattered = ("reduce_scatter_tensor", 10 * 24 * 4)
        # A chunk is gathered while the one before it is computed with.
        ahead = [gathered] * 2
        assert calls["summed, sequence"] == ahead + [statistics, scattered] * 2
        assert calls["per token, sequence"] == ahead + [statistics] * 2 + ahead + [scattered] * 2


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("form", checks.FORMS)
def test_memory_at_16384_tokens_is_one_chunk_and_the_gradients(
    form: str, implementation: str
) -> None:
    assert 0.9 < checks.fake_peak(form, implementation) <= 1.2


@pytest.mark.slow
def test_resident_memory_is_no_more() -> None:
    # Of its own: a process's peak never falls again.
    fresh = InterpretedProcess()
    assert 0.9 < fresh.call(f"{CHECKS}:resident_peak", form="summed") <= 1.2
    fresh.close()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_one_graph(interpreted: InterpretedProcess, implementation: str) -> None:
    interpreted.call(f"{CHECKS}:one_graph", implementation=implementation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 5), (5, 64), (0, 4)])
def test_narrowing_in_place_is_rounding(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp32_products, "_BLOCK_ELEMENTS", 16)
    total = torch.randn(shape)
    expected, pointer = total.to(dtype), total.data_ptr()
    narrow = fp32_products.narrowed_in_place(total, dtype)
    assert torch.equal(narrow, expected)
    assert narrow.data_ptr() == pointer and narrow.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wide_products_pass_opcheck_and_equal_fp64(dtype: torch.dtype) -> None:
    left, right = torch.randn(3, 1100).to(dtype), torch.randn(1100, 5).to(dtype)
    exact = left.double() @ right.double()
    torch.testing.assert_close(
        fp32_products.wide_product(left, right).double(), exact, rtol=0, atol=1e-4
    )
    total = torch.ones(3, 5)
    fp32_products.add_wide_product(total, left.t().contiguous(), right)
    torch.testing.assert_close(total.double(), 1 + exact, rtol=0, atol=1e-4)
    torch.library.opcheck(torch.ops.phi4.wide_product.default, (left, right))
    added = (total, left.t().contiguous(), right)
    torch.library.opcheck(torch.ops.phi4.add_wide_product.default, added)
    torch.library.opcheck(torch.ops.phi4_copying.add_wide_product.default, added)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_main_grad_grows_by_the_gradient_and_autograd_gets_none(function: Callable) -> None:
    plain, buffered = leaves(), leaves()
    function(*plain, Y)[0].sum().backward()
    main_grad = torch.ones(8, 4)
    for _ in range(2):
        function(*buffered, Y, main_grad=main_grad)[0].sum().backward()
    assert buffered[1].grad is None
    torch.testing.assert_close(main_grad, 1 + 2 * plain[1].grad)
    torch.testing.assert_close(buffered[0].grad, 2 * plain[0].grad)


def test_a_factor_on_the_total_scales_both_gradients() -> None:
    plain, scaled = leaves(), leaves()
    summed_linear_cross_entropy(*plain, Y).total.backward()
    (summed_linear_cross_entropy(*scaled, Y).total / 3).backward()
    for whole, third in zip(plain, scaled, strict=True):
        torch.testing.assert_close(third.grad, whole.grad / 3)


def test_a_factor_in_half_precision_is_not_rounded_first() -> None:
    hidden, weight = (leaf.detach().bfloat16().requires_grad_() for leaf in leaves())
    summed_linear_cross_entropy(hidden, weight, Y).total.backward()
    other = hidden.detach().clone().requires_grad_()
    (summed_linear_cross_entropy(other, weight, Y).total * 1.0117).backward()
    assert torch.equal(other.grad, (hidden.grad.float() * 1.0117).bfloat16())


def test_a_factor_that_main_grad_does_not_have_gives_nan(monkeypatch: Any) -> None:
    hidden, weight = leaves()
    total = summed_linear_cross_entropy(hidden, weight, Y, main_grad=torch.zeros(8, 4)).total
    (total * 2).backward()
    assert hidden.grad.isnan().all()
    monkeypatch.setenv("PHI4_KERNELS_DEBUG", "1")
    total = summed_linear_cross_entropy(hidden, weight, Y, main_grad=torch.zeros(8, 4)).total
    with pytest.raises(KernelError, match=r"gradient is 2\.0; expected 1"):
        (total * 2).backward()


def test_a_second_backward_raises_or_is_right() -> None:
    once, twice = leaves(), leaves()
    losses = linear_cross_entropy(*once, Y).losses.sum()
    losses.backward(retain_graph=True)
    kept = once[1].grad.clone()
    losses.backward()
    torch.testing.assert_close(once[1].grad, 2 * kept)
    total = summed_linear_cross_entropy(*twice, Y).total
    total.backward(retain_graph=True)
    with pytest.raises(KernelError, match="backward ran before"):
        total.backward()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_without_autograd_nothing_is_kept_or_added(function: Callable) -> None:
    saved, main_grad = [], torch.zeros(8, 4)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor)
    with torch.no_grad(), hooks:
        out = function(*leaves(), Y, main_grad=main_grad)
    assert not saved and not main_grad.any() and not out[0].requires_grad
    assert torch.equal(out.log_probs, function(*leaves(), Y).log_probs)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(function: Callable, frozen: int) -> None:
    both, one = leaves(), leaves()
    one[frozen].requires_grad_(False)
    for pair in (both, one):
        function(*pair, Y)[0].sum().backward()
    assert one[frozen].grad is None
    assert torch.equal(one[1 - frozen].grad, both[1 - frozen].grad)


def test_only_the_total_is_differentiable() -> None:
    out = summed_linear_cross_entropy(*leaves(), Y)
    assert out.total.requires_grad
    assert not out.losses.requires_grad and not out.log_probs.requires_grad
    torch.testing.assert_close(out.total, out.losses.sum())


@pytest.mark.parametrize("name", ["sharded", "summed_linear"])
def test_what_torch_is_timed_as_is_the_same_function(name: str) -> None:
    """A provider's gradients are checked on a GPU only when it is timed; this one's here too."""
    entry = registry.entries()[
        {"sharded": "cross_entropy_sharded"}.get(name, f"{name}_cross_entropy")
    ]
    inputs = entry.make(entry.proof_cases[0], torch.float32)
    found = numerics.evaluate(function("torch", entry), inputs, None)
    expected = numerics.evaluate(entry.reference, inputs, None)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)


def _last_chunk_lost(self: chunks.Head, num_rows: int) -> Iterator[slice]:
    step = self.layout.chunk_tokens
    return (slice(start, start + step) for start in range(0, num_rows - step, step))


MUTANTS = {
    "the last chunk is lost": (chunks.Head, "spans", _last_chunk_lost, "summed"),
    "the last chunk's weight gradient alone": (
        chunks,
        "add_wide_product",
        lambda total, left, right: total.copy_(fp32_products.wide_product(left.t(), right)),
        "per token",
    ),
    "the first chunk's targets for all": (
        chunks.Head,
        "of_chunk",
        lambda self, tensor, span: None if tensor is None else tensor[: span.stop - span.start],
        "per token",
    ),
    "weight gradient summed in bf16": (
        chunks,
        "add_wide_product",
        lambda total, left, right: total.copy_((total + left.t() @ right).bfloat16()),
        "into main_grad",
    ),
    "unweighted": (chunks, "run_forward", None, "summed"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, form = MUTANTS[mutant]
    genuine = chunks.run_forward
    kind = checks.KINDS[1]
    checks.expect_right([checks.on_rank(0, 1, kind, form, chunk=3)], kind, form)
    monkeypatch.setattr(owner, name, wrong or (lambda *args: genuine(*args[:2], None, *args[3:])))
    with pytest.raises(GateError):
        checks.expect_right([checks.on_rank(0, 1, kind, form, chunk=3)], kind, form)
