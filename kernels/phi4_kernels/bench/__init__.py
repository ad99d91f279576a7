"""The bench: time against the floor, beside the best others, only while the op is right."""
