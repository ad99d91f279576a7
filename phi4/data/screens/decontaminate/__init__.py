"""Decontamination: remove benchmark items from training text by the report's hybrid n-gram rule.

The rule is the report's; there are two ways to split a text into words. `paper` is exactly the
report's. `robust`, the default, is invariant to line breaks, case, punctuation, HTML entities and
number formats, because an n-gram rule only matches text whose words are unchanged.
"""

from phi4.data.screens.decontaminate.benchmark import Item, read_benchmarks
from phi4.data.screens.decontaminate.normalise import NORMALISATIONS
from phi4.data.screens.decontaminate.rule import Detector, Finding, Match, Thresholds, Verdict
from phi4.data.screens.decontaminate.run import decontaminate, learn_allowed

__all__ = [
    "NORMALISATIONS",
    "Detector",
    "Finding",
    "Item",
    "Match",
    "Thresholds",
    "Verdict",
    "decontaminate",
    "learn_allowed",
    "read_benchmarks",
]
