"""The errors of phi4_kernels. Each message gives the value, the expected value and the remedy.

They are separate from phi4.errors because the package runs without phi4.
"""


class KernelError(Exception):
    """Base of all errors that a caller can correct."""


class DtypeError(KernelError):
    """A tensor has a dtype that the op or the implementation does not take."""


class ShapeError(KernelError):
    """A tensor has the wrong shape or strides, or a layout does not add up."""


class DeviceError(KernelError):
    """Tensors are on different devices, or on one that the implementation cannot use."""


class PositionError(KernelError):
    """A position or a document boundary is out of range."""


class TargetError(KernelError):
    """A target id is outside the vocabulary."""


class ImplementationError(KernelError):
    """An implementation does not exist, cannot be imported or does not support this size."""


class UnavailableError(KernelError):
    """A provider of the bench is not installed, or has no such op."""


class GateError(KernelError):
    """A kernel failed a gate: wrong numbers, touched memory, or more resources than its budget."""
