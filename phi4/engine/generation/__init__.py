"""Generation: draws, key-value blocks and batched decoding over the model's own weights."""
