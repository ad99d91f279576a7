"""Rows of training data under the column names that TRL and NeMo-RL use."""
