"""Preference pairs of single tokens, made from the pivots of a search."""
