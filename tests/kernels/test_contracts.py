"""What every op keeps to, whichever implementation runs it: strides, autocast, autograd."""

import pytest
from phi4_kernels import registry
from phi4_kernels.testing.interpreted import InterpretedProcess

CHECKS = "tests.kernels.contract_checks"
SMALL = {
    "attention": "not-causal",
    "linear_cross_entropy": "h32-v520-all-terms",
    "summed_linear_cross_entropy": "h32-v520-all-terms",
    "rope_qkv": "odd-heads-strided",
}
"""Cases that are small and have side inputs, where the first one is or has not."""
ENTRIES = {
    name: entry for name, entry in registry.entries("triton").items() if "sharded" not in name
}
"""Without the steps of cross-entropy, which are no public function and take dense vectors only."""
CASES = [(name, SMALL.get(name, entry.proof_cases[0].name)) for name, entry in ENTRIES.items()]
DIFFERENTIABLE = [case for case in CASES if ENTRIES[case[0]].differentiable]

both = pytest.mark.parametrize("implementation", ["torch", "triton"])


@both
@pytest.mark.parametrize(("entry", "case"), [*CASES, ("rope_qkv", "partial-documents")])
def test_strides_of_vectors_do_not_matter(
    interpreted: InterpretedProcess, entry: str, case: str, implementation: str
) -> None:
    sizes = {"entry": entry, "case": case, "implementation": implementation}
    interpreted.call(f"{CHECKS}:strides_of_vectors_do_not_matter", **sizes)


AUTOCAST = [
    (*case, implementation)
    for case in CASES
    for implementation in ("torch", "triton")
    if implementation == "torch" or ENTRIES[case[0]].op != "attention"
]
"""Attention has no product outside of its kernels, where autocast cannot reach."""


@pytest.mark.parametrize(("entry", "case", "implementation"), AUTOCAST)
def test_autocast_changes_nothing(
    interpreted: InterpretedProcess, entry: str, case: str, implementation: str
) -> None:
    sizes = {"entry": entry, "case": case, "implementation": implementation}
    interpreted.call(f"{CHECKS}:autocast_changes_nothing", **sizes)


@both
@pytest.mark.parametrize(("entry", "case"), DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(
    interpreted: InterpretedProcess, entry: str, case: str, implementation: str
) -> None:
    sizes = {"entry": entry, "case": case, "implementation": implementation}
    interpreted.call(f"{CHECKS}:second_derivatives_are_right_or_refused", **sizes)


@both
@pytest.mark.parametrize(
    "check",
    [
        "a_second_derivative_of_the_summed_loss_is_refused",
        "overwriting_is_noticed",
        "positions_outside_the_tables_give_nan",
        "callers_that_own_their_autograd_may_pass_any_strides",
    ],
)
def test_single_ops(interpreted: InterpretedProcess, check: str, implementation: str) -> None:
    interpreted.call(f"{CHECKS}:{check}", implementation=implementation)
