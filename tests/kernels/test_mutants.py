"""Every file of an op can be mutated; the mutant reaches what runs, and is gone afterwards."""

import importlib

import pytest
from phi4_kernels import attention, registry
from phi4_kernels.errors import GateError
from phi4_kernels.testing import gates
from phi4_kernels.testing.mutants import mutant

# Plain functions: of torch's implementation, of a registered operator, of a class, of autograd.
FUNCTIONS = {
    "torch_impl.py": ("losses * weights", "losses", "linear_cross_entropy"),
    "fp32_products.py": (
        "wide = right.float()",
        "wide = 2 * right.float()",
        "linear_cross_entropy",
    ),
    "chunks.py": (
        "step = max(1, self.layout.chunk_tokens // self.num_parts)\n",
        "step = max(1, self.layout.chunk_tokens // self.num_parts)\n        num_rows -= 1\n",
        "linear_cross_entropy",
    ),
    "linear.py": (
        "saved = (normalizer, flat(dlosses), flat(dlog_probs))",
        "saved = (normalizer, flat(dlosses), None)",
        "linear_cross_entropy",
    ),
    "op.py": ("return gradient, None", "return -gradient, None", "cross_entropy"),
}


def test_a_file_that_an_implementation_imports_can_be_mutated() -> None:
    """That the kernels then compute something else is shown in test_numbers."""
    shipped, text = registry.implementation("attention", "triton"), "dp - delta[:, None]"
    with mutant("attention", "triton_dq.py", text, "dp"):
        other = registry.implementation("attention", "triton")
        assert text not in other.triton_dq._dq_block.src
        assert other.triton_dq.span is other.span is not shipped.span
    assert registry.implementation("attention", "triton") is shipped
    assert attention.triton_dq is shipped.triton_dq
    assert importlib.import_module(shipped.__name__) is shipped


@pytest.mark.parametrize("file", FUNCTIONS)
def test_every_file_of_plain_functions_can_be_mutated(file: str) -> None:
    old, new, entry = FUNCTIONS[file]
    case = {"cross_entropy": "v8200-all-terms", "linear_cross_entropy": "h32-v520-all-terms"}
    check = (entry, case[entry], "bf16", "torch")
    with mutant("cross_entropy", file, old, new), pytest.raises(GateError):
        gates.check_numbers(*check)
    assert gates.check_numbers(*check)


def test_a_text_that_is_absent_or_in_no_function_is_an_error() -> None:
    with (
        pytest.raises(ValueError, match="has no 'no such text'"),
        mutant("rope", "op.py", "no such text", ""),
    ):
        pass
    with (
        pytest.raises(ValueError, match="no function of"),
        mutant("cross_entropy", "fp32_products.py", "_BLOCK_SUMMANDS = 512", "_BLOCK_SUMMANDS = 1"),
    ):
        pass
