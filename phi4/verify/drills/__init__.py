"""Faults on purpose: a recipe's own run is told to stop, or killed, at random moments."""
