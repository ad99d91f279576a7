"""Gate 2: torch's opcheck on every registered operator."""

import pytest
from phi4_kernels import registry
from phi4_kernels.testing.interpreted import InterpretedProcess

CROSS_ENTROPY = {
    "phi4::cross_entropy_statistics",
    "phi4::cross_entropy_combine",
    "phi4::cross_entropy_backward",
}
PRODUCTS = {"phi4::add_wide_product"}
"""Of one rank in bf16: its gradient of hidden needs no sum over ranks in fp32."""
OPERATORS = {
    "attention": {"phi4::attention_forward", "phi4::attention_backward"},
    "attention_forward": {"phi4::attention_forward"},
    "attention_backward": {"phi4::attention_backward"},
    "cross_entropy": CROSS_ENTROPY,
    "cross_entropy_sharded": CROSS_ENTROPY,
    "linear_cross_entropy": CROSS_ENTROPY | PRODUCTS,
    "summed_linear_cross_entropy": CROSS_ENTROPY | PRODUCTS,
    "rms_norm": {"phi4::rms_norm_forward", "phi4::rms_norm_backward"},
    "add_rms_norm": {"phi4::add_rms_norm_forward", "phi4::rms_norm_backward"},
    "rms_norm_fp8": {"phi4::rms_norm_fp8"},
    "rms_norm_fp8_columnwise": {"phi4::rms_norm_fp8"},
    "rope_qkv": {"phi4::rope_forward", "phi4::rope_backward"},
    "swiglu": {"phi4::swiglu_forward", "phi4::swiglu_backward"},
    "swiglu_backward": {"phi4::swiglu_backward"},
    "swiglu_linear": {"phi4::swiglu_forward", "phi4::swiglu_backward"},
    "swiglu_fp8": {"phi4::swiglu_fp8"},
    "swiglu_fp8_columnwise": {"phi4::swiglu_fp8"},
}


@pytest.mark.parametrize("entry", registry.entries("triton"))
def test_operators_pass_opcheck(interpreted: InterpretedProcess, entry: str) -> None:
    case = registry.entries()[entry].proof_cases[0].name
    gate = "phi4_kernels.testing.gates:check_operators"
    assert set(interpreted.call(gate, entry=entry, case=case, dtype="bf16")) == OPERATORS[entry]
