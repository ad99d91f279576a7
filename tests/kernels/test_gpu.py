"""What only a GPU can show: compiled numerics, determinism under load, 64-bit rows. `make gpu`."""

import pytest
import torch
from phi4_kernels import registry
from phi4_kernels.rms_norm import rms_norm
from phi4_kernels.swiglu import swiglu
from phi4_kernels.testing import gates, numerics, opcheck

pytestmark = pytest.mark.gpu

CHECKS = [check for entry in registry.entries("triton").values() for check in gates.names(entry)]
ENTRIES = list(registry.entries("triton").values())
REPEATS = 1000


@pytest.mark.parametrize(("entry", "case", "dtype"), CHECKS)
def test_triton_obeys_the_error_rule(entry: str, case: str, dtype: str) -> None:
    gates.check_numbers(entry, case, dtype, "triton", "cuda")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_operators_pass_opcheck(entry: registry.Entry) -> None:
    assert opcheck.check(entry, entry.proof_cases[0], torch.bfloat16, "cuda")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_thousand_runs_agree_in_every_bit_under_load(entry: registry.Entry) -> None:
    widest = max(entry.proof_cases, key=lambda case: max(_numbers(case)))
    first, again = numerics.run(entry, widest, torch.bfloat16, "triton", "cuda")
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        numerics.expect_same_bits(entry.name, first, again())


def _numbers(case: registry.Case) -> list[int]:
    return [value for value in case.sizes.values() if isinstance(value, int)]


@pytest.mark.parametrize(("function", "width"), [(swiglu, 2 * 17920), (None, 5120)])
def test_rows_over_2_to_the_31_elements_are_right(function: object, width: int) -> None:
    rows = 2**31 // width + 3
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)

    def run(part: torch.Tensor) -> torch.Tensor:
        if function is swiglu:
            return swiglu(part, implementation="triton")
        return rms_norm(part, weight, 1e-5, implementation="triton")

    assert torch.equal(run(x)[-3:], run(x[-3:].clone()))
