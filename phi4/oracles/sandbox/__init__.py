"""Run untrusted programs with bubblewrap; report how a run ended, not whether it is right.

There is a single, strict isolation; if it cannot be set up, nothing is run.
"""

from phi4.oracles.sandbox.supervisor import run
from phi4.oracles.sandbox.task import Ended, Limits, Outcome, Task
from phi4.oracles.sandbox.tools import Tools, find_tools

__all__ = ["Ended", "Limits", "Outcome", "Task", "Tools", "find_tools", "run"]
