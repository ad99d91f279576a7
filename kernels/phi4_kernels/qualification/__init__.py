"""Self-qualification on a user's GPU: which kernels are correct there, and which are fastest."""

from phi4_kernels.qualification.qualify import (
    LIMIT_SECONDS,
    KernelFinding,
    Prover,
    Qualification,
    is_needed,
    qualify,
)

__all__ = ["LIMIT_SECONDS", "KernelFinding", "Prover", "Qualification", "is_needed", "qualify"]
