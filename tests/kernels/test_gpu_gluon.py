"""What only a Hopper GPU can show of the Gluon kernels: `make gpu`, part hopper."""

from functools import partial

import pytest
import torch
from phi4_kernels import launch, registry
from phi4_kernels.attention import Ranges, attention
from phi4_kernels.testing import gates, numerics
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]

ENTRIES = [entry for entry in registry.entries().values() if entry.op == "attention"]
CHECKS = [check for entry in ENTRIES for check in gates.names(entry, "gluon")]
REPEATS = 1000
LENGTHS = (1, 700, 64, 3, 129, 2048, 1151)


@pytest.mark.parametrize(("entry", "case", "dtype"), CHECKS)
def test_gluon_obeys_the_error_rule(entry: str, case: str, dtype: str) -> None:
    gates.check_numbers(entry, case, dtype, "gluon", "cuda")


def results(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, ranges: Ranges) -> numerics.Results:
    run = partial(attention, ranges=ranges, implementation="gluon")
    leaves = {"q": q, "k": k, "v": v}
    out = numerics.evaluate(
        lambda **inputs: run(**inputs).out, registry.CallInputs(leaves), (dout,)
    )
    return {name: tensor.clone() for name, tensor in out.items()}


@pytest.fixture(scope="module")
def problem() -> tuple:
    """phi-4's heads over seven documents."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens, offsets = sum(LENGTHS), [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]

    def drawn(heads: int) -> Tensor:
        values = torch.randn(tokens, heads, 128, generator=generator, device="cuda")
        return values.bfloat16()

    ranges = Ranges.of(offsets, offsets[:-1], offsets[1:], "cuda")
    return drawn(40), drawn(10), drawn(10), drawn(40), ranges


@pytest.mark.parametrize("num_programs", [1, 7, 66])
def test_the_number_of_programs_does_not_change_a_bit(
    problem: tuple, num_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = results(*problem)
    monkeypatch.setattr(launch, "persistent_programs", lambda *_: num_programs)
    numerics.expect_same_bits(f"{num_programs} programs", first, results(*problem))


def test_a_thousand_runs_agree_in_every_bit_under_load(problem: tuple) -> None:
    first = results(*problem)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        numerics.expect_same_bits("attention", first, results(*problem))
