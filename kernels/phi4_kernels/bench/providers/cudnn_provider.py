"""cuDNN's attention through PyTorch; it has no other op of ours there."""

from collections.abc import Callable
from typing import Any

from phi4_kernels.bench.providers import documents
from phi4_kernels.registry import Entry


def _attention(entry: Entry) -> Callable[..., Any]:
    from torch.nn.attention import SDPBackend

    return documents.sdpa(SDPBackend.CUDNN_ATTENTION)


FUNCTIONS = {"attention": _attention}
