"""Which loss heads support which objectives; imports no torch, so that a recipe can be checked."""

from typing import Literal

from phi4.errors import ConfigError

GradientForm = Literal["masked_nll", "any"]
"""masked_nll: the loss sum is minus the sum of log-probabilities times the loss mask. any: another
function of the log-probabilities, of alternative labels too."""


def check_gradient_form(form: str, gradient: GradientForm) -> None:
    """Check that a loss head can compute an objective's gradient.

    Args:
        form: the recipe's loss_head.form.
        gradient: what the objective declares.

    Raises:
        ConfigError: one_pass, which computes gradients before there is a loss, with `any`.
    """
    if gradient not in ("masked_nll", "any"):
        raise ConfigError(f"an objective's gradient is {gradient!r}; use 'masked_nll' or 'any'")
    if form == "one_pass" and gradient != "masked_nll":
        raise ConfigError(
            "loss_head.form=one_pass computes the gradient of minus the masked sum of "
            "log-probabilities; the objective or its alternative labels need a different gradient; "
            "use recompute or logits"
        )
