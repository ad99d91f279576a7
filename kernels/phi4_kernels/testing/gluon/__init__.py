"""An emulator of the parts of Hopper that a Gluon kernel uses, on the CPU; see emulator.py."""
