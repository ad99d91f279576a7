"""Fault drills: a recipe's run is notified or killed at random moments."""
