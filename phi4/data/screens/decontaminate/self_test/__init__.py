"""Self-test of the decontamination: benchmark items are inserted into a corpus and must be
found."""
