"""Mutants of the Triton kernels of attention: heads of other groups, and what is not
finite outside of a query's range."""

import pytest
from phi4_kernels.errors import GateError
from phi4_kernels.testing.interpreted import InterpretedProcess

GATE = "phi4_kernels.testing.gates:check_numbers"
NEIGHBOURS = "tests.kernels.attention_checks:what_is_not_finite_stays_in_its_document"


NOT_FINITE = {
    "values of a neighbour are multiplied by 0": ("triton_impl.py", "v = finite(v)", "v = v"),
    "values that are seen count as zeros": ("triton_impl.py", "s + marks[None, :]", "s"),
    "keys of a neighbour are multiplied by 0": ("triton_dq.py", "k = finite(k)", "k = k"),
    "queries of a neighbour are multiplied by 0": (
        "triton_dkdv.py",
        "kept = is_finite & (rows < last)",
        "kept = rows < last",
    ),
    "delta of a neighbour is multiplied by 0": (
        "triton_dkdv.py",
        "delta = tl.where(is_finite, delta, 0.0)",
        "delta = delta",
    ),
    "queries that are not finite count as zeros": (
        "triton_dkdv.py",
        'lse2 = tl.where(is_finite, lse2, float("nan"))',
        "lse2 = tl.where(is_finite, lse2, 0.0)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", NOT_FINITE)
def test_what_is_not_finite_is_held_to_its_document(
    mutated: InterpretedProcess, mutant: str
) -> None:
    with pytest.raises(GateError, match="AssertionError"):
        mutated.call(NEIGHBOURS, mutant=("attention", *NOT_FINITE[mutant]), implementation="triton")


OF_HEAD, OF_ANOTHER = "head // group * stride_k_head", "head % (num_heads // group) * stride_k_head"
CASES = {
    "another key head in the forward pass": (
        ("triton_impl.py", OF_HEAD, OF_ANOTHER),
        ("attention_forward", "decoding"),
    ),
    "another key head in dq": (
        ("triton_dq.py", OF_HEAD, OF_ANOTHER),
        ("attention_backward", "far-keys"),
    ),
    "another group's queries in dk and dv": (
        ("triton_dkdv.py", "key_head * stride_q_group", "key_head * stride_q_head"),
        ("attention_backward", "far-keys"),
    ),
    "gaps are multiplied by 0": (
        ("triton_impl.py", "v = finite(v)", "v = v"),
        ("attention_forward", "ranges"),
    ),
    "a part takes the heads of the first": (
        ("triton_dkdv.py", "tl.cast(part * members, tl.int64)", "tl.cast(part * 0, tl.int64)"),
        ("attention", "long-tiles"),
    ),
    "parts lie over each other": (
        ("triton_dkdv.py", "tl.cast(part, tl.int64) * stride_part", "tl.cast(part, tl.int64)"),
        ("attention", "long-tiles"),
    ),
    "a part is not added": (
        ("triton_dkdv.py", "tl.static_range(1, PARTS)", "tl.static_range(2, PARTS)"),
        ("attention", "long-tiles"),
    ),
    "keys that nobody sees get a gradient": (
        ("triton_dkdv.py", "(keys < end_key) & (low < high)", "keys < end_key"),
        ("attention_backward", "far-keys"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", CASES)
def test_a_mutant_turns_the_gate_red(mutated: InterpretedProcess, mutant: str) -> None:
    change, (entry, case) = CASES[mutant]
    with pytest.raises(GateError, match="error is"):
        mutated.call(GATE, mutant=("attention", *change), entry=entry, case=case, dtype="bf16")
