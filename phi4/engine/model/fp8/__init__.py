"""Linear layers whose three products run in FP8: forward, input gradient, weight gradient."""
