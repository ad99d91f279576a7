"""Gate 2: torch's opcheck on every registered operator."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from phi4_kernels import registry
from phi4_kernels.testing.interpreted import InterpretedProcess

OF_CSRC = {"phi4::adamw_", "phi4::square_sum", "phi4::fp8_cast"}
"""Checked in tests/csrc/test_library.py: they need the library."""
OF_SEVERAL_RANKS = {"phi4::wide_product"}
"""The gradient of hidden of one rank needs no sum over ranks in fp32."""

OperatorsOf = Callable[[str], frozenset[str]]


@pytest.fixture(scope="module")
def operators_of(interpreted: InterpretedProcess) -> OperatorsOf:
    """Names of the operators that an entry runs, each put through opcheck once."""

    @cache
    def find(entry: str) -> frozenset[str]:
        case = registry.entries()[entry].proof_cases[0].name
        gate = "phi4_kernels.testing.gates:check_operators"
        return frozenset(interpreted.call(gate, entry=entry, case=case, dtype="bf16"))

    return find


@pytest.mark.parametrize("entry", registry.entries("triton"))
def test_operators_pass_opcheck(operators_of: OperatorsOf, entry: str) -> None:
    assert operators_of(entry), "the entry runs no operator: no kernel has run"


def test_every_operator_is_checked(operators_of: OperatorsOf) -> None:
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("phi4::")}
    checked = frozenset().union(*map(operators_of, registry.entries("triton")))
    assert ours - OF_CSRC - OF_SEVERAL_RANKS == checked
