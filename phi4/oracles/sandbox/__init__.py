"""Runs a program that nobody trusts, by bubblewrap; says how it ended, never whether it is right.

The decision: there is one line of defence, the hard one, and where it cannot be built nothing runs.
"""

from phi4.oracles.sandbox.supervisor import run
from phi4.oracles.sandbox.task import Ended, Limits, Outcome, Task
from phi4.oracles.sandbox.tools import Tools, find_tools

__all__ = ["Ended", "Limits", "Outcome", "Task", "Tools", "find_tools", "run"]
