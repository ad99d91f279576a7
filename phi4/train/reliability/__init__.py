"""Fault handling: preemption notices, hangs, loss spikes and faulty hardware."""
