"""A search that kills itself: `python -m tests.pts.search.killed_search DIR LOG KILL_AT`.

Every request and every completion of the sampler is a line of LOG before the search learns of it.
At the KILL_AT-th of them the process sends itself SIGKILL; 0 lets it end.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from phi4.pts.search.command import Search, search_and_write
from phi4.pts.search.settings import SearchMode, settings_of
from phi4.sampling.protocol import Completion, Event, Request
from phi4.sampling.scripted import ScriptedSampler
from tests.pts.search.planted import (
    OPTIONS,
    LastLetterOracle,
    PlantedScript,
    questions,
    small_tokenizer,
)


class KilledSampler(ScriptedSampler):
    """Logs what happens, and ends its process in the middle of it."""

    def __init__(self, log: Path, kill_at: int) -> None:
        tokenizer = small_tokenizer()
        super().__init__(PlantedScript(tokenizer), tokenizer)
        self._log = log.open("a")
        self._left = kill_at
        self._keys: dict[int, list] = {}

    def submit(self, request: Request) -> int:
        key = [request.prompt, request.forced, sorted(request.forbidden_first), request.seed]
        self._note({"asked": key, "n": request.n})
        request_id = super().submit(request)
        self._keys[request_id] = key
        return request_id

    def step(self) -> Sequence[Event]:
        happened = super().step()
        for event in happened:
            if isinstance(event, Completion):
                ids = [token.id for token in event.tokens]
                key = self._keys[event.request_id]
                self._note({"drawn": key, "sample": event.sample, "ids": ids})
        return happened

    def _note(self, line: dict) -> None:
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the search of two questions."""
    directory, log, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    sampler = KilledSampler(log, kill_at)
    search = Search(
        questions=questions(2),
        settings=settings_of(SearchMode.DEFAULT, seed=3),
        options=OPTIONS,
        model="planted",
        oracle="last letter",
        directory=directory,
    )
    search_and_write(search, sampler, small_tokenizer(), LastLetterOracle())


if __name__ == "__main__":
    main()
