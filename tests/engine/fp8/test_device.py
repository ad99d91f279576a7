"""GPUs that FP8 through torch is refused on: one line, before anything starts."""

import pytest
import torch

from phi4.config import PrecisionConfig
from phi4.engine.model.fp8.device import check_device
from phi4.errors import PlatformError

GPU = torch.device("cuda", 0)


def precision(scaling: str = "tensorwise", dtype: str = "bf16", fp8: str = "torch"):
    return PrecisionConfig(fp8=fp8, fp8_recipe=scaling, dtype=dtype)


@pytest.mark.parametrize(
    ("asked", "capability", "text"),
    [
        (precision(), (8, 0), "compute capability 8.0: FP8 needs 8.9; use precision.fp8=off"),
        (precision("blockwise"), (9, 0), "use precision.fp8_recipe=tensorwise or rowwise"),
        (precision("rowwise", "fp32"), (9, 0), "use precision.dtype=bf16, or"),
    ],
)
def test_gpu_is_refused_with_a_remedy(
    asked: PrecisionConfig, capability: tuple[int, int], text: str, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(PlatformError) as refused:
        check_device(asked, GPU)
    assert text in str(refused.value) and "\n" not in str(refused.value)
    check_device(asked, torch.device("cpu"))


@pytest.mark.parametrize(
    ("asked", "capability"),
    [
        (precision(), (8, 9)),
        (precision("rowwise"), (9, 0)),
        (precision("tensorwise", "fp32"), (10, 0)),
        (precision("blockwise", fp8="off"), (8, 0)),
    ],
)
def test_gpu_with_fp8_is_taken(
    asked: PrecisionConfig, capability: tuple[int, int], monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_device(asked, GPU)
