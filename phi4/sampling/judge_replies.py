"""Replies of a judge on disk, so that a job that was killed asks nothing twice.

The decision: a reply is stored before anybody looks at it, under a key that holds everything it
depends on: the judge, the prompt's token ids, the sampling and the number of the attempt.
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
        path: of the file, made if it is missing.

    Raises:
        DataError: it is something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(_TABLE)
        except sqlite3.Error as error:
            raise DataError(
                f"{path} is no store of replies ({error}); remove it, or give another --out"
            ) from None

    def find(self, key: str) -> str | None:
        """The reply under a key."""
        row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def add(self, key: str, *, judge: str, attempt: int, prompt: str, reply: str) -> None:
        """Keep a reply, and what was asked for people to read; on the disk when this returns."""
        self._database.execute(
            "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)",
            (key, judge, attempt, _storable(prompt), _storable(reply)),
        )

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def reply_key(judge: str, prompt: Sequence[int], sampling: dict[str, object], attempt: int) -> str:
    """The name of a reply.

    Args:
        judge: identity of the model.
        prompt: token ids.
        sampling: how it is drawn.
        attempt: index of the sample, from 0.
    """
    asked = [judge, list(prompt), sampling, attempt]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _storable(text: str) -> str:
    """sqlite takes no lone surrogates."""
    return text.encode(errors="replace").decode()
