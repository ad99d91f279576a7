"""Other implementations to time against: which provider has which entry, and how it is called.

Third parties are imported inside functions, when a provider is asked for. A provider's result is
checked by the error rule like ours, and the row records whether it passes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from phi4_kernels.bench.providers import attention, layers, optimizers_and_casts, plain_torch
from phi4_kernels.bench.providers import cross_entropy as loss
from phi4_kernels.errors import UnavailableError
from phi4_kernels.registry import Entry

Run = Callable[..., Any]
"""Takes an entry's inputs and returns its outputs."""

TABLE: dict[str, dict[str, Callable[[], Run]]] = {
    "torch": {
        "attention": attention.torch_flash,
        "cross_entropy": partial(loss.of_logits, loss.torch_losses),
        "cross_entropy_sharded": partial(loss.of_logits_with_gradient, loss.torch_losses),
        "linear_cross_entropy": partial(loss.of_hidden, loss.torch_losses),
        "summed_linear_cross_entropy": partial(loss.total_with_gradients, loss.torch_total),
    },
    "compile": {
        "cross_entropy_sharded": partial(loss.of_logits_with_gradient, loss.compiled_losses),
        "summed_linear_cross_entropy": partial(loss.total_with_gradients, loss.compiled_total),
    },
    "torch-chunked": {
        "summed_linear_cross_entropy": partial(loss.total_with_gradients, loss.chunked_total)
    },
    "liger": {
        "cross_entropy": partial(loss.of_logits, loss.liger_losses),
        "cross_entropy_sharded": partial(loss.of_logits_with_gradient, loss.liger_losses),
        "linear_cross_entropy": partial(loss.of_hidden, loss.liger_losses),
        "summed_linear_cross_entropy": partial(loss.total_with_gradients, loss.liger_total),
        "rms_norm": layers.liger_rms_norm,
        "add_rms_norm": layers.liger_add_rms_norm,
        "swiglu": layers.liger_swiglu,
        "rope_qkv": layers.liger_rope_qkv,
    },
    "te": {
        "cross_entropy": partial(loss.of_logits, loss.te_losses),
        "cross_entropy_sharded": partial(loss.of_logits_with_gradient, loss.te_losses),
        "rms_norm": layers.te_rms_norm,
        "swiglu": layers.te_swiglu,
        "optimizer_step": optimizers_and_casts.te_optimizer_step,
        "fp8_cast_transpose": optimizers_and_casts.te_fp8_cast_transpose,
    },
    "cudnn": {"attention": attention.torch_cudnn},
    "flash-attn": {
        "attention": attention.flash_attn_2,
        "rms_norm": layers.flash_attn_rms_norm,
        "add_rms_norm": layers.flash_attn_add_rms_norm,
        "swiglu": layers.flash_attn_swiglu,
    },
    "flash-attn-deterministic": {"attention": partial(attention.flash_attn_2, deterministic=True)},
    "flash-attn-3": {"attention": attention.flash_attn_3},
    "flash-attn-3-deterministic": {
        "attention": partial(attention.flash_attn_3, deterministic=True)
    },
    "apex": {"optimizer_step": optimizers_and_casts.apex_optimizer_step},
}
"""By name for `--against`, then by entry. `torch` stands for the best of eager and compile."""

OTHER_ENTRIES: dict[str, Callable[[Entry], Run]] = {
    "torch": plain_torch.eager,
    "compile": plain_torch.compiled,
}
"""The form that these providers use for entries that are not in the table."""


def function(provider: str, entry: Entry) -> Run:
    """The provider's form of an entry.

    Raises:
        UnavailableError: it is not installed, or has no such op.
    """
    try:
        if entry.name in TABLE[provider]:
            return TABLE[provider][entry.name]()
        # Eager and compiled torch run the definition of any entry.
        if provider in OTHER_ENTRIES:
            return OTHER_ENTRIES[provider](entry)
    except ImportError as error:
        raise UnavailableError(f"{provider}: {error}; expected it installed; install it") from None
    raise UnavailableError(f"{provider} has no {entry.name}; expected one; drop it")
