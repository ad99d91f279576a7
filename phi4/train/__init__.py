"""The training loop: steps, hooks, saves, resumption and the status that a run ends with."""
