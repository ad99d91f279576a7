"""Add weight gradients to megatron-core's fp32 buffer inside the product that computes them.

Otherwise every micro-batch writes a weight's gradient in the weight's dtype, which rounds it, and a
second pass reads it, and reads and writes the buffer, to add it.
"""

from types import SimpleNamespace

import torch
from phi4_kernels.swiglu import swiglu, swiglu_backward

# Shape legend: T tokens, I and O a linear's input and output width, F and H those of the second
# linear of the MLP.


def add_weight_gradient(
    input_TI: torch.Tensor, grad_output_TO: torch.Tensor, main_grad_OI: torch.Tensor
) -> None:
    """main_grad_OI, fp32, += grad_output_TO.T @ input_TI, summed in fp32 in any dtype of the two.

    A GPU's product takes bf16 and adds in fp32. A CPU's bf16 product would round what it adds to
    bf16, so the factors are widened, which costs time where a processor has instructions for bf16.
    """
    if main_grad_OI.is_cuda:
        grad_output_OT = grad_output_TO.t()
        torch.addmm(
            main_grad_OI, grad_output_OT, input_TI, out_dtype=torch.float32, out=main_grad_OI
        )
    else:
        main_grad_OI.addmm_(grad_output_TO.float().t(), input_TI.float())


FUSED_WEIGHT_GRADIENTS = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
"""The functions of apex' extension `fused_weight_gradient_mlp_cuda` that megatron-core's linears
use."""


class AddsItsOwnGradient(torch.autograd.Function):
    """A weight whose gradient the op has already added to main_grad when megatron-core's hook
    runs."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor) -> torch.Tensor:
        """Return a view of the weight."""
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, _: None) -> None:
        """Tell the hook that there is nothing to add."""
        weight = ctx.weight
        # The hook requires a gradient, of one element here, and drops it.
        weight.grad = weight.new_empty(()).expand(weight.shape)
        weight.grad_added_to_main_grad = True


class SwiGLULinearIntoMainGrad(torch.autograd.Function):
    """phi4_kernels' swiglu_linear, which adds the weight's gradient to main_grad itself."""

    @staticmethod
    def forward(
        ctx,
        gate_up_T2F: torch.Tensor,
        weight_HF: torch.Tensor,
        main_grad_HF: torch.Tensor,
        implementation: str,
    ) -> torch.Tensor:
        """Return [T, H]; save only gate_up, from which backward recomputes the product."""
        ctx.save_for_backward(gate_up_T2F, weight_HF)
        ctx.main_grad_HF, ctx.implementation = main_grad_HF, implementation
        return swiglu(gate_up_T2F, implementation=implementation) @ weight_HF.t()

    @staticmethod
    def backward(ctx, grad_TH: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Return the gradient of gate_up."""
        gate_up_T2F, weight_HF = ctx.saved_tensors
        gradient_T2F, product_TF = swiglu_backward(
            grad_TH @ weight_HF,
            gate_up_T2F,
            emit_product=True,
            implementation=ctx.implementation,
        )
        assert product_TF is not None, "asked for above"
        add_weight_gradient(product_TF, grad_TH, ctx.main_grad_HF)
        return gradient_T2F, None, None, None
