"""`phi4 kernels` without a GPU."""

import pytest
import torch
from typer.testing import CliRunner

from phi4.cli.kernels import app
from phi4.errors import ConfigError, PlatformError


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_without_a_gpu_there_is_nothing_to_qualify() -> None:
    done = CliRunner().invoke(app, ["qualify"])
    assert isinstance(done.exception, PlatformError)
    assert "nothing to qualify" in str(done.exception)


def test_an_op_that_does_not_exist_is_named() -> None:
    done = CliRunner().invoke(app, ["qualify", "--op", "softmax"])
    assert isinstance(done.exception, ConfigError)
    assert "no op 'softmax'; there are adamw" in str(done.exception)
