"""The loss head: per-token log-probabilities over a vocabulary that tensor ranks share.

A thin seam to phi4_kernels, whose gradient takes the place of the logits; objectives never see
logits.
"""

import torch
import torch.distributed as dist
from phi4_kernels.cross_entropy import cross_entropy

# Shape legend: S positions, B rows, V vocabulary, tp tensor ranks.


def vocab_parallel_log_probs(
    logits_SBV: torch.Tensor,
    labels_BS: torch.Tensor,
    group: dist.ProcessGroup,
    implementation: str = "torch",
) -> torch.Tensor:
    """Log-probability of each label.

    Args:
        logits_SBV: [S, B, V / tp], this rank's columns; backward overwrites them.
        labels_BS: [B, S], int64, global token ids in [0, V).
        group: the tensor ranks.
        implementation: of cross_entropy; see phi4_kernels.dispatch.

    Returns:
        [B, S], fp32, the same on every rank of the group.

    Collectives: forward one all-gather over the group, 12 bytes per token and rank; backward none.
    """
    shared = group if group.size() > 1 else None
    labels_SB = labels_BS.t().contiguous()
    out = cross_entropy(logits_SBV, labels_SB, group=shared, implementation=implementation)
    return out.log_probs.t()
