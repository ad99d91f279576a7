"""Preferences: rows in, token files of pairs or pivots out."""
