"""Programs in answers: run in the sandbox, their values compared outside of it."""

from phi4.oracles.code.oracle import CodeOracle

__all__ = ["CodeOracle"]
