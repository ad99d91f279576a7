"""The start gate: checks that a preference stage runs on its own data before the first step."""

from phi4.stages.gate.start import start_gate

__all__ = ["start_gate"]
