"""Pairs of single tokens, made of the pivots that a search found."""
