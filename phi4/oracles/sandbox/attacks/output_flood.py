"""Unlimited output."""

import sys

for _ in range(300):
    sys.stdout.write("y" * (1 << 20))
