"""Warnings attributed to our modules are errors in tests."""

import warnings

import pytest

WARN = "import warnings; warnings.warn('careful')"


@pytest.mark.parametrize("module", ["phi4", "phi4.engine.step", "phi4_kernels.dispatch"])
def test_our_warning_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="careful"):
        exec(WARN, {"__name__": module})


@pytest.mark.parametrize("module", ["megatron.core", "phi4x", "torch.phi4"])
def test_foreign_warning_is_not(module: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        exec(WARN, {"__name__": module})
    assert [str(warning.message) for warning in caught] == ["careful"]
