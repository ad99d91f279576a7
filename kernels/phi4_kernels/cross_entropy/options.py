"""Options of the loss."""

from dataclasses import dataclass

from phi4_kernels.errors import KernelError


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Constants of the loss; the defaults are plain cross-entropy.

    Raises:
        KernelError: label_smoothing is not in [0, 1) or z_loss is negative.
    """

    ignore_index: int = -100
    """Tokens with this target have loss, log-probability and gradient 0."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Factor of (log of the sum of exponentials)^2."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.0 <= self.label_smoothing < 1.0:
            raise KernelError(
                f"LossOptions: label_smoothing is {self.label_smoothing}; expected 0 <= x < 1; "
                "pass a share of the target"
            )
        if not self.z_loss >= 0.0:
            raise KernelError(
                f"LossOptions: z_loss is {self.z_loss}; expected 0 or more; drop the sign"
            )


PLAIN = LossOptions()
