"""Alternative labels at some positions, scored in the same forward pass as the first labels.

The hidden rows of those positions are appended to the loss head's input with the alternative label,
so the cost is one additional row per pair, in any form of the loss head. Under sequence parallelism
each tensor rank appends rows of its own slice, padded to the same number on all, so that the head
gathers as usual; the labels are known to every rank, so no communication is needed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from phi4.engine.layout import Layout

# Shape legend: B rows, S columns of a context rank, T = S * B tokens (S outer), P tensor ranks that
# split them (1 without sequence parallelism), R = T / P, A appended rows per part, N second labels.


class LabelLogProbs(NamedTuple):
    """Output of the last model chunk, fp32, the same on every tensor rank."""

    labels_BS: torch.Tensor
    alternatives_BS: torch.Tensor | None
    """0 where there is no alternative label; None if the batch has none at all."""


@dataclass(frozen=True)
class AlternativeRows:
    """The rows that this rank appends, and the positions of their results."""

    shape: tuple[int, int]
    """(B, S)."""
    mask_BS: torch.Tensor
    """Mask of positions with an alternative label."""
    labels_1X: torch.Tensor
    """Labels for the head, [1, P * (R + A)]: of each part, then its alternative ones."""
    appended_A: torch.Tensor
    """Indices of the rows to append among this tensor rank's R rows."""
    slots_N: torch.Tensor
    """Indices of the rows that are not padding among all P * A appended rows."""
    places_N: torch.Tensor
    """Their positions among the T tokens."""
    num_parts: int

    def append(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Return [R + A, 1, H] from this rank's hidden states [S, B, H] (S / P under SP)."""
        rows_RH = hidden_SBH.flatten(0, 1)
        return torch.cat((rows_RH, rows_RH.index_select(0, self.appended_A))).unsqueeze(1)

    def split(self, log_probs_1X: torch.Tensor) -> LabelLogProbs:
        """Split into results of labels and of alternative labels."""
        num_rows, length = self.shape
        num_tokens = num_rows * length
        log_probs_PX = log_probs_1X.reshape(self.num_parts, -1)
        part = num_tokens // self.num_parts
        found_N = log_probs_PX[:, part:].flatten().index_select(0, self.slots_N)
        second_T = log_probs_1X.new_zeros(num_tokens).scatter(0, self.places_N, found_N)
        first_T = log_probs_PX[:, :part].flatten()
        return LabelLogProbs(*(x.view(length, num_rows).t() for x in (first_T, second_T)))


def alternative_rows(
    labels_BS: torch.Tensor, alternatives_BS: torch.Tensor, layout: Layout
) -> AlternativeRows:
    """Plan the rows of one micro-batch, on the host.

    Args:
        labels_BS: int64, this context rank's columns.
        alternatives_BS: int64, the same columns; -1 where there is no alternative label.
        layout: determines how tensor ranks split the tokens.
    """
    num_parts = layout.tp_size if layout.parallel.sequence else 1
    second_PR = alternatives_BS.t().reshape(num_parts, -1)
    has_PR = second_PR >= 0
    most = int(has_PR.sum(dim=1).max())
    # Those with an alternative label first; a part that has fewer is padded with others.
    columns_PA = torch.argsort(~has_PR, dim=1, stable=True)[:, :most]
    second_PA = second_PR.gather(1, columns_PA)
    slots_N = (second_PA >= 0).flatten().nonzero().flatten()
    part_starts_P1 = torch.arange(num_parts).unsqueeze(1) * second_PR.shape[1]
    labels_PX = torch.cat((labels_BS.t().reshape(num_parts, -1), second_PA.clamp_min(0)), dim=1)
    return AlternativeRows(
        shape=(labels_BS.shape[0], labels_BS.shape[1]),
        mask_BS=(alternatives_BS >= 0),
        labels_1X=labels_PX.reshape(1, -1),
        appended_A=columns_PA[layout.tp_rank if num_parts > 1 else 0],
        slots_N=slots_N,
        places_N=(part_starts_P1 + columns_PA).flatten()[slots_N],
        num_parts=num_parts,
    )
