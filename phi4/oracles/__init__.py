"""Oracles that grade answers: exact, choice, math and code, with a sandbox that runs programs."""
