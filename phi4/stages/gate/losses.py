"""The losses of `dpo.loss` computed on the host, independently of the engine.

This is a deliberate second implementation: the gate compares the stage's objective with it.
"""

import numpy as np

from phi4.config import DpoConfig

# Shape legend: N = 2 P segments of P pairs, alternating chosen and rejected sides.


def mean_margin(log_ratios_N: np.ndarray) -> float:
    """Mean over pairs of the chosen minus the rejected side's log-ratio."""
    return float((log_ratios_N[0::2] - log_ratios_N[1::2]).mean())


def mean_loss(
    log_ratios_N: np.ndarray,
    tokens_N: np.ndarray,
    settings: DpoConfig,
    chosen_nll_P: np.ndarray | None = None,
) -> float:
    """Mean over pairs of the loss.

    Args:
        log_ratios_N: log-probability of each side minus the reference's, [2 P].
        tokens_N: loss tokens of each side, [2 P].
        settings: which loss.
        chosen_nll_P: negative log-probability of each chosen side over the tokens per pair, [P];
            needed with an sft term.

    Source: see `DpoConfig.loss`.
    """
    if settings.loss in ("ipo", "sigmoid_norm"):
        log_ratios_N = log_ratios_N / np.maximum(tokens_N, 1)
    margins_P = log_ratios_N[0::2] - log_ratios_N[1::2]
    scaled_P = settings.beta * margins_P
    if settings.loss == "hinge":
        losses_P = np.maximum(0.0, 1.0 - scaled_P)
    elif settings.loss == "ipo":
        losses_P = (margins_P - 0.5 / settings.beta) ** 2
    else:
        share = settings.label_smoothing
        losses_P = (1 - share) * np.logaddexp(0, -scaled_P) + share * np.logaddexp(0, scaled_P)
    if settings.sft_weight:
        assert chosen_nll_P is not None
        losses_P = losses_P + settings.sft_weight * chosen_nll_P
    return float(losses_P.mean())
