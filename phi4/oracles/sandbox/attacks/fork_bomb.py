"""More processes than are allowed."""

import os
import time

num_forks = 0
try:
    while num_forks < 400:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        num_forks += 1
except BlockingIOError:
    pass
print("refused" if num_forks < 16 else f"{num_forks} forks", flush=True)
os._exit(0)
