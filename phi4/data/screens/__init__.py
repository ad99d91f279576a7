"""Screens: what is taken out of a corpus, and why."""
