"""What a sweep shows: tables with intervals, rank correlation, the best learning rate. Arithmetic
only: results come in as plain values."""
