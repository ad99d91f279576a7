"""docs/tutorials/kernel.md quotes what the gates say, and names files that there are."""

import re

import pytest
import torch
from phi4_kernels import launch, registry
from phi4_kernels.errors import GateError, ImplementationError
from phi4_kernels.launch import Launch
from phi4_kernels.testing import budgets, error_rule, numerics

from tests.architecture.sizes import ROOT

PAGE = (ROOT / "docs/tutorials/kernel.md").read_text(encoding="utf-8")


def test_over_budget_is_said_as_quoted() -> None:
    names = (*budgets._AT_MOST, *budgets._AT_LEAST)
    budget = dict.fromkeys(names, 0) | {"registers": 32}
    key = "swiglu/w17920/bf16/_swiglu_backward_kernel"
    (line,) = budgets.over_budget(key, budget | {"registers": 82}, budget)
    assert f"\n{line}\n" in PAGE


def test_the_error_rule_speaks_as_quoted() -> None:
    truth = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(GateError) as raised:
        error_rule.check("swiglu/w63 out0", truth.bfloat16() * 1.1, truth.bfloat16(), truth)
    numbers = re.compile(r"\d[\d.e+]*")
    quoted = re.search(r"GateError: (swiglu/w63 out0 .*)", PAGE)[1]
    assert numbers.sub("N", str(raised.value)) == numbers.sub("N", quoted)
    with pytest.raises(GateError, match="two runs differ; expected equal bits"):
        numerics.expect_same_bits("a", {"x": torch.zeros(1)}, {"x": torch.ones(1)})
    assert "`two runs differ; expected equal bits`" in PAGE


def test_a_ladder_that_ends_too_early_says_so() -> None:
    with pytest.raises(ImplementationError) as raised:
        launch.pick((Launch(1024, 512, 4),), 17920)
    assert f"\n{raised.value}\n" in PAGE


def test_the_quoted_ladders_are_those_of_the_file() -> None:
    text = (registry.folder("swiglu") / "triton_impl.py").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert quoted in text


def test_what_the_page_names_exists() -> None:
    for name in re.findall(r"`((?:kernels|tests|docs)/[\w/.]+)`", PAGE):
        assert (ROOT / name).exists() or (ROOT / name.rstrip("/")).exists(), name
    folder = {path.name for path in (ROOT / "tests/kernels/new_op/stretch").glob("*.py")}
    (listed,) = re.findall(r"Copy the folder to .*", PAGE)
    assert set(re.findall(r"`(\w+\.py)`", listed)) == folder
    readme = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in folder)
