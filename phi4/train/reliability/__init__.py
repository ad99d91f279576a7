"""What keeps a run alive, or ends it with a name: notices, hangs, spikes, wrong hardware."""
