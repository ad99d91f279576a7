"""The training loop: a run directory, steps, hooks, and an end that tells the truth."""
