"""Processor time spread over processes, each below its own limit."""

import os

for _ in range(6):
    if os.fork() == 0:
        break
while True:
    pass
