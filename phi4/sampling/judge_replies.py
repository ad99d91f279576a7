"""Store a judge's replies on disk, so that a resumed job requests none twice.

A reply is stored before it is used, under a key derived from everything it depends on: the judge,
the prompt's token ids, the sampling parameters and the number of the attempt.
"""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from phi4.errors import DataError

_TABLE = (
    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, judge TEXT NOT NULL, "
    "attempt INTEGER NOT NULL, prompt TEXT NOT NULL, reply TEXT NOT NULL) WITHOUT ROWID"
)


class ReplyStore:
    """The replies in one sqlite file.

    Args:
        path: file, created if missing.

    Raises:
        DataError: the file is something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(_TABLE)
        except sqlite3.Error as error:
            raise DataError(
                f"{path} is not a store of replies ({error}); remove it, or give another --out"
            ) from None

    def find(self, key: str) -> str | None:
        """Return the reply under a key."""
        row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def add(self, key: str, *, judge: str, attempt: int, prompt: str, reply: str) -> None:
        """Store a reply, with its prompt for human readers; durable when this returns."""
        self._database.execute(
            "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)",
            (key, judge, attempt, _storable(prompt), _storable(reply)),
        )

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def reply_key(judge: str, prompt: Sequence[int], sampling: dict[str, object], attempt: int) -> str:
    """Return the key of a reply.

    Args:
        judge: identity of the model.
        prompt: token ids.
        sampling: sampling parameters.
        attempt: number of the attempt, from 0.
    """
    asked = [judge, list(prompt), sampling, attempt]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _storable(text: str) -> str:
    """Replace lone surrogates, which sqlite does not accept."""
    return text.encode(errors="replace").decode()
