"""Attention of other libraries on a GPU that has them. `make gpu`, part `libraries`."""

import pytest
import torch
from phi4_kernels import registry
from phi4_kernels.attention import Ranges, attention
from phi4_kernels.errors import ImplementationError
from phi4_kernels.testing import gates
from torch import Tensor

pytestmark = pytest.mark.gpu

ENTRIES = [entry for entry in registry.entries().values() if entry.op == "attention"]
CHECKS = [
    (name, *check)
    for name in registry.FOREIGN
    for entry in ENTRIES
    for check in gates.names(entry, name)
]
REPEATS = 200
LENGTHS = (1, 700, 64, 64, 3, 129, 2048, 1151)


def _needs(name: str) -> None:
    if reason := registry.missing("attention", name):
        pytest.skip(reason)


@pytest.mark.parametrize(("name", "entry", "case", "dtype"), CHECKS)
def test_adaptors_obey_the_error_rule(name: str, entry: str, case: str, dtype: str) -> None:
    _needs(name)
    gates.check_numbers(entry, case, dtype, name, "cuda")


def results(implementation: str, lengths: tuple[int, ...]) -> list[Tensor]:
    """out, dq, dk and dv of phi-4's heads over these documents."""
    generator = torch.Generator("cuda").manual_seed(0)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q, k, v, dout = (
        torch.randn(offsets[-1], heads, 128, generator=generator, device="cuda").bfloat16()
        for heads in (40, 10, 10, 40)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ranges = Ranges.of(offsets, offsets[:-1], offsets[1:], "cuda")
    out = attention(*leaves, ranges, implementation=implementation).out
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("name", ["flash", "torch"])
@pytest.mark.parametrize("lengths", [LENGTHS, (4096,)], ids=["documents", "one"])
def test_runs_under_load_agree_in_every_bit(name: str, lengths: tuple[int, ...]) -> None:
    _needs(name)
    first, differs = results(name, lengths), torch.zeros((), dtype=torch.bool, device="cuda")
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        for one, two in zip(first, results(name, lengths), strict=True):
            differs |= (one != two).any()
    assert not differs


@pytest.mark.parametrize("name", registry.FOREIGN)
def test_documents_that_only_the_device_knows_are_refused(name: str) -> None:
    _needs(name)
    q, k, v = (torch.zeros(8, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    boundaries = torch.tensor([0, 8], dtype=torch.int32, device="cuda")
    with pytest.raises(ImplementationError, match="does not serve ranges"):
        attention(q, k, v, Ranges.packed(boundaries, 8), implementation=name)
    attention(q, k, v, Ranges.packed(boundaries, 8, 8), implementation=name)
