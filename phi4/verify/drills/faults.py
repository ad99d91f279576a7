"""The faults of the drills: a notice to some of a run's processes, and a killed rank."""

import re
import signal
from random import Random

from phi4.errors import REQUEUE_EXIT_CODE
from phi4.verify.drills.drill import SAVE_EVERY
from phi4.verify.drills.watched_run import WatchedRun

_STOPPED = re.compile(r"^stopped after step (\d+) of", re.MULTILINE)
_STOPPED_AT_START = re.compile(r"^stopped before the first step", re.MULTILINE)


class Notice:
    """SIGTERM or SIGUSR1 to the launcher, to one rank, or to all processes of the run."""

    def strike(self, attempt: WatchedRun, random: Random) -> str:
        """Send it."""
        number = random.choice((signal.SIGTERM, signal.SIGUSR1))
        receivers = random.choice(("launcher", "rank", "all"))
        ranks = [] if receivers == "launcher" else attempt.await_ranks()
        rank = random.randrange(len(ranks)) if ranks else 0
        pids = {"launcher": [attempt.pid], "all": [*ranks, attempt.pid]}
        attempt.send(number, pids.get(receivers, ranks[rank : rank + 1]))
        who = f"rank {rank}" if receivers == "rank" else receivers
        return f"{number.name} to {who}"

    def verdict(self, attempt: WatchedRun, code: int, before: set[int], after: set[int]) -> str:
        """Require code 5, and exactly one checkpoint that only the notice caused."""
        if code != REQUEUE_EXIT_CODE:
            return f"exit code {code}"
        output = attempt.output()
        new = after - before
        if _STOPPED_AT_START.search(output):
            return f"saved {sorted(new)} without a step" if new else ""
        stopped = _STOPPED.search(output)
        if stopped is None:
            return "no line says where it stopped"
        step = int(stopped.group(1))
        others = {saved for saved in new if saved % SAVE_EVERY and saved != step}
        # A save that is postponed, because an asynchronous one was in progress, may be of any step.
        if max(after, default=0) != step or (others and "is put off until" not in output):
            return f"stopped after step {step}, new checkpoints {sorted(new)}"
        return ""


class Kill:
    """SIGKILL to a rank."""

    def strike(self, attempt: WatchedRun, random: Random) -> str:
        """Send it."""
        ranks = attempt.await_ranks()
        if not ranks:
            return "SIGKILL to no process"
        rank = random.randrange(len(ranks))
        attempt.send(signal.SIGKILL, [ranks[rank]])
        return f"SIGKILL to rank {rank}"

    def verdict(self, attempt: WatchedRun, code: int, before: set[int], after: set[int]) -> str:
        """Require the exit code of a killed rank, and that no checkpoint was lost."""
        if code != 128 + signal.SIGKILL:
            return f"exit code {code}"
        if before and max(before) not in after:
            return f"checkpoint of step {max(before)} is gone"
        return ""
