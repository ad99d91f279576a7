"""Preference pairs of full answers, ordered by a judge or an oracle, from any models."""
