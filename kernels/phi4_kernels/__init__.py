"""phi4_kernels: the fused ops of a Phi-4 step, each with its definition, its kernels and its proof.

One folder per op, whose package exports its public functions: `from phi4_kernels.swiglu import
swiglu`. It stands alone: torch is all that an op needs, Triton is loaded when a kernel first runs.
"""
