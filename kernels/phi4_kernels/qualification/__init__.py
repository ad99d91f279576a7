"""The first minute on a user's card: which kernels are right here, and which are fastest."""

from phi4_kernels.qualification.qualify import (
    LIMIT_SECONDS,
    KernelFinding,
    Prover,
    Qualification,
    is_needed,
    qualify,
)

__all__ = ["LIMIT_SECONDS", "KernelFinding", "Prover", "Qualification", "is_needed", "qualify"]
