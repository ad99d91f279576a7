"""The self-test: benchmark items planted in a corpus that decontamination has to find."""
