"""Pivotal token search: find the tokens of an answer that change its probability of being right."""
