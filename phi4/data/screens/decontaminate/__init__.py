"""Benchmarks out of training text: the report's hybrid n-gram rule, and a measure of what it finds.

The rule is the report's; how a text is read as words has two names. `paper` is the report's form,
kept to the bit. `robust`, the default, does not change with line breaks, case, punctuation, HTML
entities and the format of numbers, because an n-gram rule can find no more than its words survive.
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
