"""Linear layers whose three products take FP8: forward, input gradient, weight gradient."""
