"""Analysis of sweeps: tables with intervals, rank correlation, the best learning rate."""
