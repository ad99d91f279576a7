"""Mathematical answers: exact numbers by ourselves, everything else by math-verify.

The decision: where neither can tell, the answer is ungradable. A wrong verdict in either direction
teaches a model something false; no verdict teaches it nothing.
"""

from phi4.oracles.math.oracle import MathOracle

__all__ = ["MathOracle"]
