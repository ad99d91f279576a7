"""The training stream: sources, units and windows, blends and their ledger, batches."""
