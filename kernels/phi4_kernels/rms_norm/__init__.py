"""RMSNorm, alone or after a residual add, in bf16, fp16 and fp32 or with FP8 output."""

from phi4_kernels.rms_norm.op import (
    FP8Norm,
    add_rms_norm,
    rms_norm,
    rms_norm_backward,
    rms_norm_fp8,
)

__all__ = ["FP8Norm", "add_rms_norm", "rms_norm", "rms_norm_backward", "rms_norm_fp8"]
