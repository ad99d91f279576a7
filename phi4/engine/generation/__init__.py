"""Generation: sampling, key-value blocks and batched decoding with the model's own weights."""
