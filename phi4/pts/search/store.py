"""Store everything that a search sampled in one SQLite file.

A block of completions is stored in one transaction with the blocks that were graded with it, under
the ids of its prompt. A killed search therefore repeats only the blocks that were in flight, and a
block is never stored partially.
"""

import fcntl
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from phi4.errors import ConfigError, DataError
from phi4.pts.search.rollouts import Rollout, RolloutBlock, share_of

FILE_NAME = "search.sqlite"
_LOCK_NAME = "search.lock"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS nodes (
    id INTEGER PRIMARY KEY, prompt BLOB NOT NULL, prefix BLOB NOT NULL,
    forced INTEGER NOT NULL, forbidden INTEGER NOT NULL, purpose TEXT NOT NULL,
    UNIQUE (prompt, prefix, forced, forbidden, purpose));
CREATE TABLE IF NOT EXISTS blocks (
    node INTEGER NOT NULL, number INTEGER NOT NULL, n INTEGER NOT NULL, seed INTEGER NOT NULL,
    successes INTEGER NOT NULL, trials INTEGER NOT NULL, ungradable INTEGER NOT NULL,
    truncated INTEGER NOT NULL, tokens INTEGER NOT NULL, rollouts BLOB NOT NULL,
    PRIMARY KEY (node, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS results (question TEXT PRIMARY KEY, found BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (id INTEGER PRIMARY KEY, seconds REAL NOT NULL);
CREATE VIEW IF NOT EXISTS node_totals AS
    SELECT node, count(*) AS blocks, min(seed) AS least_seed, max(seed) AS largest_seed,
        sum(successes) AS successes, sum(trials) AS trials, sum(ungradable) AS ungradable,
        sum(truncated) AS truncated, sum(tokens) AS tokens
    FROM blocks GROUP BY node;
"""
_NODE = "prompt=? AND prefix=? AND forced=? AND forbidden=? AND purpose=?"


@dataclass(frozen=True)
class StoredBlock:
    """A block with its results.

    Attributes:
        prompt: ids of the question's prompt.
        block: the requested block.
        seed: seed of its request.
        rollouts: all n rollouts.
    """

    prompt: tuple[int, ...]
    block: RolloutBlock
    seed: int
    rollouts: tuple[Rollout, ...]


class SearchStore:
    """The file of one search; use `opened_store`.

    Args:
        connection: to the file.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._rollouts = msgspec.msgpack.Decoder(tuple[Rollout, ...])

    def rollouts(self, prompt: tuple[int, ...], block: RolloutBlock) -> tuple[Rollout, ...] | None:
        """Return the rollouts of a block; None if it is not stored."""
        row = self._connection.execute(
            "SELECT rollouts FROM blocks JOIN nodes ON node = id "
            f"WHERE {_NODE} AND number=? AND n=?",
            (*_node_key(prompt, block), block.number, block.n),
        ).fetchone()
        return None if row is None else self._rollouts.decode(row[0])

    def save(self, blocks: Iterable[StoredBlock]) -> None:
        """Add blocks in one transaction."""
        with self._connection:
            for one in blocks:
                key, share = _node_key(one.prompt, one.block), share_of(one.rollouts)
                self._connection.execute(
                    "INSERT OR IGNORE INTO nodes (prompt, prefix, forced, forbidden, purpose) "
                    "VALUES (?, ?, ?, ?, ?)",
                    key,
                )
                self._connection.execute(
                    "INSERT INTO blocks SELECT id, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM nodes "
                    f"WHERE {_NODE}",
                    (
                        *(one.block.number, one.block.n, one.seed, share.successes, share.trials),
                        len(one.rollouts) - share.trials,
                        sum(rollout.is_truncated for rollout in one.rollouts),
                        sum(rollout.num_tokens for rollout in one.rollouts),
                        self._encoder.encode(one.rollouts),
                        *key,
                    ),
                )

    def save_result(self, question: str, found: bytes) -> None:
        """Store the encoded result of a question."""
        with self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO results VALUES (?, ?)", (question, found)
            )

    def result(self, question: str) -> bytes | None:
        """Return the result of a question; None while it is being searched."""
        row = self._connection.execute(
            "SELECT found FROM results WHERE question=?", (question,)
        ).fetchone()
        return None if row is None else row[0]

    def add_seconds(self, seconds: float) -> None:
        """Record the sampling time of a session."""
        with self._connection:
            self._connection.execute("INSERT INTO sessions (seconds) VALUES (?)", (seconds,))

    def seconds(self) -> float:
        """Return the total time of all recorded sessions."""
        return self._connection.execute("SELECT total(seconds) FROM sessions").fetchone()[0]

    def keep_identity(self, identity: Mapping[str, str]) -> None:
        """Store the identity of this search, or compare it with the stored one.

        Raises:
            ConfigError: the store belongs to another search.
        """
        with self._connection:
            noted = dict(self._connection.execute("SELECT name, value FROM identity"))
            if not noted:
                self._connection.executemany("INSERT INTO identity VALUES (?, ?)", identity.items())
        if noted:
            _check(noted, identity)


@contextmanager
def opened_store(directory: Path, identity: Mapping[str, str]) -> Iterator[SearchStore]:
    """Open the store of a search exclusively.

    Args:
        directory: created if missing.
        identity: values that distinguish this search from others.

    Raises:
        ConfigError: the directory belongs to another search, or another process uses it.
        DataError: its store cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another process is searching in {directory}; wait for it, or use another --out"
            ) from None
        with _connected(directory / FILE_NAME) as connection:
            connection.executescript(_SCHEMA)
            store = SearchStore(connection)
            store.keep_identity(identity)
            yield store


def check_store(directory: Path, identity: Mapping[str, str]) -> None:
    """Raise an error for a directory with another search, without writing to it.

    Raises:
        ConfigError: see `opened_store`.
        DataError: its store cannot be read.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return
    with _connected(path) as connection:
        tables = connection.execute("SELECT 1 FROM sqlite_master WHERE name='identity'").fetchall()
        noted = dict(connection.execute("SELECT name, value FROM identity")) if tables else {}
    if noted:
        _check(noted, identity)


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path)
    try:
        # Readers such as `phi4 pts show` never wait for the search.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        yield connection
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} cannot be used: {error}; use another --out") from None
    finally:
        connection.close()


def _check(noted: Mapping[str, str], identity: Mapping[str, str]) -> None:
    for name in sorted(noted.keys() | identity.keys()):
        if noted.get(name) != identity.get(name):
            raise ConfigError(
                f"--out has a search with {name}={noted.get(name)}, but this one has "
                f"{name}={identity.get(name)}; use another --out, or the same settings"
            )


def _node_key(prompt: Sequence[int], block: RolloutBlock) -> tuple[bytes, bytes, int, int, str]:
    start = block.start
    forced, forbidden = (-1 if one is None else one for one in (start.forced, start.forbidden))
    return (_packed(prompt), _packed(start.prefix), forced, forbidden, str(block.purpose))


def _packed(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<u4").tobytes()
