"""phi4_kernels: the fused ops of a Phi-4 step, each with its definition, kernels and checks.

One folder per op, whose package exports its public functions: `from phi4_kernels.swiglu import
swiglu`. The package does not import phi4. An op needs torch only; Triton is imported when a Triton
kernel first runs.
"""
