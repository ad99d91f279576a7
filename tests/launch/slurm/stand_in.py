"""A program that ends as a training does, in a fraction of a second: steps, `latest`, exit codes.

python stand_in.py RUN STEPS EVERY, on every rank. RUN/faults.json, where it exists, says what goes
wrong: {"attempt": {"rank": {"step": N, "do": "exit 6" | "kill" | "traceback" | "lost" | "stay"}}}.
Once told to end, rank 0 writes whether it was preempted to RUN/preempted.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from phi4.launch.slurm.clients import was_preempted

run, steps, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
latest = run / "checkpoints" / "latest"
told = []


def save(step: int) -> None:
    if rank == 0:
        latest.parent.mkdir(parents=True, exist_ok=True)
        latest.write_text(f"step_{step:07d}\n")


for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: told.append(number))
step = int(latest.read_text()[5:]) if latest.exists() else 0
faults = run / "faults.json"
fault = json.loads(faults.read_text()).get(attempt, {}).get(str(rank)) if faults.exists() else None
print(f"rank {rank} attempt {attempt} starts at {step} on {os.environ['MASTER_ADDR']}", flush=True)
while step < steps:
    time.sleep(0.1)
    step += 1
    print(f"step {step}", flush=True)
    if fault and step == fault["step"]:
        match fault["do"].split():
            case ["exit", code]:
                os._exit(int(code))
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["lost"]:
                raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
            case ["stay"]:
                time.sleep(3600)  # a notice does not end it
            case ["traceback"]:
                raise ValueError("a bug")
    if told or step % every == 0 or step == steps:
        save(step)
    if told or (run / "stop").exists():
        save(step)
        if told and rank == 0:
            (run / "preempted").write_text(str(was_preempted(os.environ["SLURM_JOB_ID"])))
        os._exit(5 if told else 0)
