"""Grade mathematical answers: exact numbers by our own code, everything else by math-verify.

If neither can decide, the answer is ungradable: a wrong verdict in either direction trains a model
on an error; no verdict does not.
"""

from phi4.oracles.math.oracle import MathOracle

__all__ = ["MathOracle"]
