"""Signals to every visible process."""

import contextlib
import json
import os
import signal
import sys

targets = json.load(sys.stdin)
pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
for sent in (signal.SIGTERM, signal.SIGKILL):
    for pid in (os.getppid(), 1, targets["pid"]):
        if pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(pid, sent)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with contextlib.suppress(OSError):
    os.kill(-1, signal.SIGTERM)
print("alone" if pids <= {1, 2, os.getpid()} else f"sees {sorted(pids)}")
