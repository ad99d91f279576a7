"""Parse rows of training data in the column names of TRL and NeMo-RL."""
