"""Preference data: pivotal token search, judged pairs, refusals and rejection sampling."""
