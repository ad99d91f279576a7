"""The reference model of a preference stage: its log-probabilities, computed once and checked."""

from phi4.stages.reference.check import check_reference
from phi4.stages.reference.job import cache_references
from phi4.stages.reference.sides import segment_sums

__all__ = ["cache_references", "check_reference", "segment_sums"]
