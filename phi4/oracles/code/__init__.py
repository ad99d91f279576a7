"""Grade programs in answers: run in the sandbox, with results compared outside it."""

from phi4.oracles.code.oracle import CodeOracle

__all__ = ["CodeOracle"]
