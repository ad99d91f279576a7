"""The reference model of a preference stage: computes, stores and checks its log-probabilities."""

from phi4.stages.reference.check import check_reference
from phi4.stages.reference.job import cache_references
from phi4.stages.reference.sides import segment_sums

__all__ = ["cache_references", "check_reference", "segment_sums"]
