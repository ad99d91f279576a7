"""Pivotal token search: which tokens of an answer changed the chance that it becomes right."""
