"""SwiGLU on the fused [gate | up] activation, in bf16, fp16 and fp32 or with FP8 output."""

from phi4_kernels.swiglu.op import (
    FP8Product,
    swiglu,
    swiglu_backward,
    swiglu_fp8,
    swiglu_linear,
)

__all__ = ["FP8Product", "swiglu", "swiglu_backward", "swiglu_fp8", "swiglu_linear"]
