"""Facts of single ops that need the interpreter: FP8 bits, backward functions, 64-bit addresses."""

import pytest
from phi4_kernels.errors import GateError
from phi4_kernels.testing.interpreted import InterpretedProcess

CHECKS = "tests.kernels.interpreted_checks"


@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (35, 200)])
def test_fp8_norm_equals_torch_casts(
    interpreted: InterpretedProcess, rows: int, hidden: int, columnwise: bool
) -> None:
    sizes = {"rows": rows, "hidden": hidden, "columnwise": columnwise}
    interpreted.call(f"{CHECKS}:fp8_norm_equals_torch_casts", **sizes)


@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (66, 200)])
def test_fp8_swiglu_equals_torch_casts(
    interpreted: InterpretedProcess, rows: int, width: int, columnwise: bool
) -> None:
    sizes = {"rows": rows, "width": width, "columnwise": columnwise}
    interpreted.call(f"{CHECKS}:fp8_swiglu_equals_torch_casts", **sizes)


def test_backward_functions_equal_autograd(interpreted: InterpretedProcess) -> None:
    interpreted.call(f"{CHECKS}:backward_functions_equal_autograd", hidden=300)


def test_rows_far_apart_are_addressed_in_64_bits(interpreted: InterpretedProcess) -> None:
    interpreted.call(f"{CHECKS}:rows_far_apart_are_addressed_in_64_bits")


def test_a_32_bit_address_is_caught(mutated: InterpretedProcess) -> None:
    # It may well crash, which is an answer too.
    with pytest.raises(GateError):
        mutated.call(
            f"{CHECKS}:rows_far_apart_are_addressed_in_64_bits",
            mutant=(
                "rms_norm",
                "triton_impl.py",
                "row = tl.program_id(0).to(tl.int64)",
                "row = tl.program_id(0)",
            ),
        )


def test_a_death_costs_one_call(mutated: InterpretedProcess) -> None:
    before = mutated.call("os:getpid")
    with pytest.raises(GateError, match=r"died \(exit -6\) in os:abort"):
        mutated.call("os:abort")
    assert mutated.call("os:getpid") != before


def test_calls_are_counted_by_implementation(interpreted: InterpretedProcess) -> None:
    assert interpreted.call(f"{CHECKS}:calls_are_counted") == {
        "rms_norm/triton": 2,
        "rope/triton": 1,
        "swiglu/torch": 1,
        "swiglu/triton": 1,
    }


def test_reasons_name_the_interpreter(interpreted: InterpretedProcess) -> None:
    assert interpreted.call(f"{CHECKS}:reasons") == {
        "auto": "auto: tensors are on cpu",
        "torch": "named",
        "triton": "named; interpreted on the CPU",
    }


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_one_graph_holds_all_ops(interpreted: InterpretedProcess, implementation: str) -> None:
    interpreted.call(f"{CHECKS}:one_graph_holds_all_ops", implementation=implementation)
