"""`phi4 kernels` without a GPU."""

from pathlib import Path

import pytest
import torch
from phi4_kernels import registry
from phi4_kernels.errors import GateError
from phi4_kernels.qualification import overview
from typer.testing import CliRunner

from phi4.cli.kernels import app
from phi4.errors import ConfigError, PlatformError

ROW = {"op": "grad_norm", "mode": "forward", "case": "n134M", "dtype": "bfloat16"}
ROW |= {"provider": "cuda", "p50_us": 100.0, "percent_of_floor": 62.4, "device": "H200"}
ROW |= {"bytes": 268435456, "flops": 268435456, "commit": "abc"}
ROW |= {"copy_bytes_per_second": 4.3e12, "matmul_flops_per_second": 7.9e14}


def test_without_a_gpu_there_is_nothing_to_qualify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["qualify"])
    assert isinstance(done.exception, PlatformError)
    assert "nothing to qualify" in str(done.exception)


def test_an_op_that_does_not_exist_is_named() -> None:
    done = CliRunner().invoke(app, ["qualify", "--op", "softmax"])
    assert isinstance(done.exception, ConfigError)
    assert "no op 'softmax'; there are adamw" in str(done.exception)


def test_show_has_all_that_is_known_of_an_op(loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview.report, "load", lambda: [ROW])
    shown = CliRunner().invoke(app, ["show", "grad_norm"])
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.output.splitlines()]
    digest = registry.source_digest("grad_norm", "cuda")
    assert any(line.startswith("cuda") and line.endswith(digest) for line in lines)
    (margin,) = (line.split() for line in lines if line.startswith("grad_norm sizes bf16"))
    assert 0 < float(margin[3]) <= 1
    budget = "square_sum_kernel<float> (csrc-13.0, budget) 32 0 2048"
    assert budget in lines
    assert not any("adamw_kernel" in line for line in lines)
    assert "grad_norm forward n134M N * 2 B 268.4 0.3 62.4" in lines
    assert "grad_norm forward n134M cuda 100.0 62% 2.68 TB/s" in lines


def test_show_says_what_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def red(*_: object) -> None:
        raise GateError("grad_norm/sizes out0: 3.1 of the rule")

    monkeypatch.setattr(overview.gates, "check_numbers", red)
    section = overview._margins("grad_norm", "torch")
    assert {row[3] for row in section.rows} == {"RED: grad_norm/sizes out0: 3.1 of the rule"}


def test_show_refuses_what_does_not_exist() -> None:
    for arguments, text in (
        (["show", "softmax"], "no op 'softmax'; there are adamw"),
        (["show", "rope", "--implementation", "cuda"], "rope has no 'cuda'; there are torch, tri"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, ConfigError) and text in str(done.exception)


def test_show_names_what_is_over_its_budget() -> None:
    names = ("registers", "num_warps", "stack_bytes", "shared_bytes", "hgmma", "hmma")
    budget = dict.fromkeys((*names, "wide_loads", "wide_stores"), 4)
    found = budget | {"registers": 6, "hgmma": 2}
    assert overview._compiled("a/b", found, budget) == (
        *("a/b", "6 (budget 4)", "4", "4", "4", "6 (budget 8)", "8"),
    )
    assert overview._compiled("a/b", found, {})[1] == "6"
