"""More memory than allowed, spread over processes that each use little."""

import os
import time

for _ in range(6):
    if os.fork() == 0:
        kept = bytearray(32 << 20)
        for at in range(0, len(kept), 4096):
            kept[at] = 1
        break
while True:
    time.sleep(0.01)
    sum(range(10000))
