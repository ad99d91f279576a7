"""A grandchild that ignores every signal and has left its session."""

import contextlib
import os
import signal
import time

if os.fork() == 0:
    os.setsid()
    for number in signal.Signals:
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        os.close(1)
        os.close(2)
        time.sleep(600)
    os._exit(0)
os.wait()
print("forked", flush=True)
os._exit(0)
