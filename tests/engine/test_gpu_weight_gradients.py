"""On a GPU a weight's gradient is added in fp32 by the product itself."""

import pytest
import torch

from phi4.engine.model.weight_gradients import add_weight_gradient


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_sums_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = {"generator": generator, "device": "cuda"}
    x, grad = torch.randn(512, 96, **drawn).to(dtype), torch.randn(512, 64, **drawn).to(dtype)
    main_grad = torch.randn(64, 96, **drawn)
    exact = main_grad.double() + grad.double().t() @ x.double()
    add_weight_gradient(x, grad, main_grad)
    assert (main_grad - exact).norm() <= 1e-5 * exact.norm()
