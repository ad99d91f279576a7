"""The start gate: what a preference stage must show on its own data before the first step."""

from phi4.stages.gate.start import start_gate

__all__ = ["start_gate"]
